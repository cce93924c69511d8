//! The volume catalog: one small record per volume, in the bucket, beside the data.
