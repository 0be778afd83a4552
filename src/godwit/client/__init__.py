"""A VM from outside: its QMP client, and a VM as a process of its own."""
