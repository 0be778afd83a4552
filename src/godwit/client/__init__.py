"""A VM from outside: a QMP client, a VM as a process of its own, and what this host lacks for one."""
