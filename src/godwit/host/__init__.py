"""The host's kernel: KVM, vhost, taps, links, sockets, the event loop."""
