"""Intel's 82540EM, which Linux drives with its e1000 driver.

"SDM" here is Intel's "PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual"
(317453). Register names are the SDM's, and those of drivers/net/ethernet/intel/e1000/e1000_hw.h.
"""
