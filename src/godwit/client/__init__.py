"""A VM from outside: a QMP client, a VM as a process of its own, and if this host can run one."""
