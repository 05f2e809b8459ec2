"""Joint's training: a factor and a count for every block, under the kernel term (section 2.4)."""

from nas.methods.kernel import KernelTraining


class JointTraining(KernelTraining):
    """Counts of channels within the channels that the factor leaves."""
