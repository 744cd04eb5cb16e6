//! The uids of what was removed last.
//!
//! The answer to a write of our own may come after the watch has told that the object is gone: it must not bring it back.

use std::collections::{HashSet, VecDeque};

/// An answer is late by a request's deadline at most; so many objects are not deleted meanwhile.
const KEPT: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Removed {
    uids: HashSet<String>,
    order: VecDeque<String>,
}

impl Removed {
    pub(super) fn add(&mut self, uid: &str) {
        if uid.is_empty() || !self.uids.insert(uid.to_owned()) {
            return;
        }
        self.order.push_back(uid.to_owned());
        if self.order.len() > KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.uids.remove(&oldest);
        }
    }

    pub(super) fn has(&self, uid: &str) -> bool {
        self.uids.contains(uid)
    }
}
