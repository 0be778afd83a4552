/* Holds a few idle KVM VMs, vCPUs and sockets open for as long as the lab runs.
 *
 * Why: the first and the last user of many kernel functions flips a static key, that is, patches
 * the running kernel's code. Under QEMU's multi-threaded TCG a second CPU can meet the int3 that
 * stands in the patched place for a moment after its handler has gone, and the kernel dies. With
 * one user that never leaves, no key changes while VMs come and go.
 *
 * Returns (exit status 0) when all is set up; a forked child stays behind and holds it.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

static int must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
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
		for (;;)
			pause();
	default:
		return 0;
	}
}
