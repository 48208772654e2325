"""The suffix index of a job: what followed the same tokens earlier, in any text of the job."""
