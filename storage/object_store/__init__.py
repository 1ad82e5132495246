"""Object stores behind fsspec: s3://, gs:// and az:// through `obstore`, with the options that their users know."""
