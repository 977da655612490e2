"""Process groups, and the CPU as a device for Megatron.

Flows in: parallel sizes and the launcher's environment. Flows out: Megatron's process groups, the
device of this process, and context managers that let Megatron run where there is no GPU.
"""
