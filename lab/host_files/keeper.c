/* What the emulated host needs beside its kernel: static keys held, and a watch on its CPUs.
 *
 * Holds a few idle KVM VMs, vCPUs and sockets open for as long as the lab runs.
 *
 * Why: the first and the last user of many kernel functions flips a static key, that is, patches
 * the running kernel's code. Under QEMU's multi-threaded TCG a second CPU can meet the int3 that
 * stands in the patched place for a moment after its handler has gone, and the kernel dies. With
 * one user that never leaves, no key changes while VMs come and go.
 *
 * Watches the CPUs, because the emulated SVM has a fault (docs/decisions/0010-the-labs-faults.md):
 * the first CPU may come to run a guest with its global interrupt flag clear, and then takes no
 * interrupt until the guest leaves by itself. A guest that computes never does, and all that waits
 * for that CPU waits for ever. No guest runs on that CPU any more; if one of them falls silent all
 * the same, the lab is ended, as one whose kernel broke.
 *
 * Returns (exit status 0) when all is set up; a forked child stays behind and does it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { CPUS = 64, SILENT_S = 20, DEBUG_EXIT = 0x501 /* QEMU's isa-debug-exit */ };

static _Atomic time_t last_seen[CPUS];
static long cpus;
static int log_fd, port_fd; /* opened at first: later this process sees no /dev any more */

static int must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

static time_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec;
}

static void end_the_lab(long cpu)
{
	char text[100];
	int length = snprintf(text, sizeof text, "<0>lab: BUG: CPU %ld took no interrupt for %d s", cpu, SILENT_S);

	if (write(log_fd, text, (size_t)length) < 0 || pwrite(port_fd, "", 1, DEBUG_EXIT) < 0)
		perror("keeper");
}

/* One of these on each CPU, before all other tasks there; each looks after the others. */
static void *watch(void *argument)
{
	long own = (long)(intptr_t)argument;
	struct timespec second = { 1, 0 };

	for (;;) {
		/* After a pause of the whole machine all of them look late: first each has to run again. */
		int late = now() - atomic_load(&last_seen[own]) > 3;

		atomic_store(&last_seen[own], now());
		for (long cpu = 0; cpu < cpus && cpu < CPUS; cpu++)
			if (!late && now() - atomic_load(&last_seen[cpu]) > SILENT_S)
				end_the_lab(cpu);
		nanosleep(&second, NULL);
	}
	return NULL;
}

static void watch_cpus(void)
{
	struct sched_param first = { .sched_priority = 90 };

	log_fd = must(open("/dev/kmsg", O_WRONLY | O_CLOEXEC), "/dev/kmsg");
	port_fd = must(open("/dev/port", O_WRONLY | O_CLOEXEC), "/dev/port");
	cpus = sysconf(_SC_NPROCESSORS_ONLN);
	for (long cpu = 0; cpu < cpus; cpu++)
		atomic_store(&last_seen[cpu], now());
	for (long cpu = 0; cpu < cpus && cpu < CPUS; cpu++) {
		pthread_attr_t how;
		pthread_t thread;
		cpu_set_t one;

		CPU_ZERO(&one);
		CPU_SET((size_t)cpu, &one);
		pthread_attr_init(&how);
		pthread_attr_setstacksize(&how, 65536);
		pthread_attr_setaffinity_np(&how, sizeof one, &one);
		pthread_attr_setinheritsched(&how, PTHREAD_EXPLICIT_SCHED);
		pthread_attr_setschedpolicy(&how, SCHED_FIFO);
		pthread_attr_setschedparam(&how, &first);
		if (pthread_create(&thread, &how, watch, (void *)(intptr_t)cpu))
			perror("keeper: pthread_create");
	}
}

int main(void)
{
	int kvm = must(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	int on = 1, vm, vcpu, sock;
	struct kvm_sregs sregs;

	/* preempt_notifier_key; apic_sw_disabled: a vCPU whose local APIC was never enabled. */
	vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000UL), "KVM_SET_TSS_ADDR");
	must(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
	must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");

	/* apic_hw_disabled: a vCPU whose APIC base says 'off' (IA32_APIC_BASE bit 11, SDM 3A 11.4.4). */
	vcpu = must(ioctl(vm, KVM_CREATE_VCPU, 1), "KVM_CREATE_VCPU");
	must(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
	sregs.apic_base &= ~(1ULL << 11);
	must(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");

	/* kvm_has_noapic_vcpu: a vCPU of a VM without an irqchip in the kernel. */
	vm = must(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	must(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");

	/* netstamp_needed_key: ping and tcpdump ask for time stamps of received packets. */
	sock = must(socket(AF_INET, SOCK_DGRAM, 0), "socket");
	must(setsockopt(sock, SOL_SOCKET, SO_TIMESTAMP, &on, sizeof on), "SO_TIMESTAMP");

	switch (must(fork(), "fork")) {
	case 0:
		setsid();
		close(0), close(1), close(2);
		watch_cpus();
		for (;;)
			pause();
	default:
		return 0;
	}
}
