"""Godwit: a KVM virtual machine monitor whose guests keep their network when they migrate."""

__version__ = "0.1.0"
