//! Keys whose events are held: new ones of them are recorded behind the held ones instead of being published.

use std::collections::HashMap;

/// For each key with held events the number that was handed over in this term. Eight bytes a key, whatever waits.
#[derive(Debug, Default)]
pub(crate) struct HeldKeys(HashMap<u64, u64>);

impl HeldKeys {
    /// Keys that a former term left held.
    pub(crate) fn new(keys: impl IntoIterator<Item = u64>) -> Self {
        Self(keys.into_iter().map(|key| (key, 0)).collect())
    }

    pub(crate) fn has(&self, key: u64) -> bool {
        self.0.contains_key(&key)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `events` more of the key are handed over.
    pub(crate) fn hand_over(&mut self, key: u64, events: u64) {
        *self.0.entry(key).or_default() += events;
    }

    /// No event of the key is held, of all those up to the `handed`th: true unless more were handed over since.
    pub(crate) fn free(&mut self, key: u64, handed: u64) -> bool {
        let all = self.0.get(&key) == Some(&handed);
        if all {
            self.0.remove(&key);
        } else if let Some(more) = self.0.get_mut(&key) {
            // the next count begins with what is left
            *more -= handed;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_free_when_all_that_was_handed_over_is_published() {
        let mut keys = HeldKeys::new([1]);
        keys.hand_over(1, 2);
        keys.hand_over(2, 1);
        assert!(!keys.free(1, 1), "one more was handed over meanwhile");
        assert!(keys.has(1));
        assert!(keys.free(1, 1));
        assert!(!keys.has(1) && keys.has(2));
        assert!(!keys.free(3, 0), "a key that is not held");
    }
}
