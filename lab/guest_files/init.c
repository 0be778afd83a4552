/* PID 1 of the lab's guest: mounts, modules, network, one line on the console, then the agent.
 *
 * It is a program, not a shell script, because every process and every console byte costs a
 * guest that runs on an emulated CPU. Kernel command line:
 *   godwit.net=off   leave eth0 alone
 *   godwit.shell     a shell on ttyS0
 *   godwit.hostile=SECONDS,SEED   attack the VMM: see hostile.c
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/input.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

static int put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t done;

	if (fd < 0)
		return -1;
	done = write(fd, text, strlen(text));
	close(fd);
	return done < 0 ? -1 : 0;
}

static size_t get(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t done = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[done < 0 ? 0 : done] = 0;
	return done < 0 ? 0 : (size_t)done;
}

/* Loads the modules that a list in /lists names, one path a line, in load order. */
static void load(const char *list)
{
	char names[8192], path[64];

	snprintf(path, sizeof path, "/lists/%s", list);
	get(path, names, sizeof names);
	for (char *name = strtok(names, "\n"); name; name = strtok(NULL, "\n")) {
		int fd = open(name, O_RDONLY | O_CLOEXEC);

		if (fd >= 0) {
			if (syscall(SYS_finit_module, fd, "", 0))
				perror(name);
			close(fd);
		}
	}
}

/* Loads the drivers of the network cards that are really there. */
static void load_network_drivers(void)
{
	DIR *devices = opendir("/sys/bus/pci/devices");
	struct dirent *entry;
	int virtio = 0, e1000 = 0;

	while (devices && (entry = readdir(devices))) {
		char path[PATH_MAX], alias[128];

		snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/modalias", entry->d_name);
		get(path, alias, sizeof alias);
		/* pci:vVVVVVVVVdDDDDDDDD...: 1041 is virtio 1.x net, 1000 its transitional form. */
		virtio |= !strncmp(alias, "pci:v00001AF4d00001041", 22) ||
			  !strncmp(alias, "pci:v00001AF4d00001000", 22);
		e1000 |= !strncmp(alias, "pci:v00008086d0000100", 21);
	}
	if (devices)
		closedir(devices);
	if (virtio)
		load("virtio_net");
	if (e1000)
		load("e1000");
}

/* Opens the input devices that have a power key: the ACPI button, and any keyboard. */
static int find_power_keys(int *keys_fds, int room)
{
	int found = 0;

	for (int i = 0; i < 16 && found < room; i++) {
		char path[32];
		unsigned char keys[KEY_MAX / 8 + 1] = { 0 };
		int fd;

		snprintf(path, sizeof path, "/dev/input/event%d", i);
		fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
		if (fd < 0)
			continue;
		ioctl(fd, EVIOCGBIT(EV_KEY, sizeof keys), keys);
		if (keys[KEY_POWER / 8] & 1 << KEY_POWER % 8)
			keys_fds[found++] = fd;
		else
			close(fd);
	}
	return found;
}

static void start_shell(void)
{
	if (fork())
		return;
	setsid();
	int fd = open("/dev/ttyS0", O_RDWR);

	if (fd >= 0) {
		dup2(fd, 0), dup2(fd, 1), dup2(fd, 2);
		ioctl(0, TIOCSCTTY, 1);
	}
	execl("/bin/busybox", "sh", "-i", NULL);
	_exit(127);
}

void power_off(void)
{
	sync();
	reboot(RB_POWER_OFF);
}

void restart(void)
{
	sync();
	reboot(RB_AUTOBOOT);
}

/* The kernel's own way to triple-fault: an empty IDT and an int3 (arch/x86/kernel/reboot.c). */
void triple_fault(void)
{
	put("/sys/kernel/reboot/type", "triple");
	reboot(RB_AUTOBOOT);
}

int main(void)
{
	char cmdline[4096];
	const char *attack;
	int control, power_keys[POWER_KEYS], found;

	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	setenv("PATH", "/bin", 1);
	get("/proc/cmdline", cmdline, sizeof cmdline);
	/* Inherited by interfaces made later. Only frames that a test asked for: no duplicate
	 * address detection, no router solicitations. */
	put("/proc/sys/net/ipv6/conf/default/accept_dad", "0");
	put("/proc/sys/net/ipv6/conf/default/accept_ra", "0");
	put("/proc/sys/net/ipv6/conf/default/router_solicitations", "0");
	if (!strstr(cmdline, "godwit.net=off")) {
		load_network_drivers();
		load("8021q");
		configure_network();
	}
	control = listening(2 /* SOCK_DGRAM */, PORT_CONTROL);
	start_traffic();
	dprintf(1, "GODWIT-GUEST-READY cpus=%ld\n", sysconf(_SC_NPROCESSORS_ONLN));
	if (strstr(cmdline, "godwit.shell"))
		start_shell();
	attack = strstr(cmdline, "godwit.hostile=");
	if (attack)
		dprintf(1, "GODWIT-GUEST-HOSTILE cpus=%ld\n", hostile(attack + strlen("godwit.hostile=")));
	load("power");
	found = find_power_keys(power_keys, POWER_KEYS);
	serve_control(control, power_keys, found);
	power_off();
}
