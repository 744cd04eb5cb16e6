//! What is kept of ended instances, and where new ones are written: the buckets of `weft.saga_rotate`.

use std::{
    sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// How often old buckets are dropped; more often with a short retention.
const ROTATION: Duration = Duration::from_mins(1);
const MIN_ROTATION: Duration = Duration::from_millis(250);

#[derive(Debug, Default)]
pub(super) struct Kept {
    /// The bucket of new instances; 0 before the first rotation, when there are none.
    bucket: AtomicI32,
    /// How long ended instances are kept, in milliseconds.
    retention_ms: AtomicU64,
}

impl Kept {
    pub(super) fn bucket(&self) -> Option<i32> {
        Some(self.bucket.load(Relaxed)).filter(|&bucket| bucket > 0)
    }

    pub(super) fn opened(&self, bucket: i32) {
        self.bucket.store(bucket, Relaxed);
    }

    pub(super) fn retention(&self) -> Duration {
        Duration::from_millis(self.retention_ms.load(Relaxed))
    }

    pub(super) fn retain(&self, milliseconds: u64) {
        self.retention_ms.store(milliseconds, Relaxed);
    }

    pub(super) fn rotation(&self) -> Duration {
        (self.retention() / 8).clamp(MIN_ROTATION, ROTATION)
    }
}
