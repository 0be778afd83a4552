"""Devices that another process serves by vhost-user: disks, shared folders."""
