"""A framework hands out arrays and takes them back (``core.pipeline.Memory``)."""
