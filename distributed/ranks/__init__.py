"""Life cycle of rank processes and communication with them, independent of any model and kind of job."""
