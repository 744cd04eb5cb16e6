//! How the store keeps what it knows of thousands of objects in little memory.

use std::{borrow::Borrow, marker::PhantomData};

use serde::{Serialize, de::DeserializeOwned};

/// A value as its JSON: a fraction of what the parsed one takes, in one allocation. For what is read rarely: an object is
/// unpacked when it is reconciled.
pub struct Packed<T> {
    json: Box<[u8]>,
    of: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Packed<T> {
    pub fn new(value: &T) -> Self {
        // what came as JSON always has a form in JSON
        let json = serde_json::to_vec(value).unwrap_or_default().into_boxed_slice();
        Self { json, of: PhantomData }
    }

    /// `None` never happens: it is the JSON of a value of this type.
    pub fn unpack(&self) -> Option<T> {
        serde_json::from_slice(&self.json)
            .inspect_err(|error| tracing::error!(%error, "what the store keeps cannot be read"))
            .ok()
    }
}

impl<T> PartialEq for Packed<T> {
    fn eq(&self, other: &Self) -> bool {
        self.json == other.json
    }
}

impl<T> std::fmt::Debug for Packed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.json))
    }
}

/// A sorted map for the few children or pods of one owner: a vector without spare room, where a B-tree has a node for eleven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallMap<K, V>(Vec<(K, V)>);

impl<K, V> Default for SmallMap<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: Ord, V> SmallMap<K, V> {
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let place = self.place(key).ok()?;
        self.0.get(place).map(|(_, value)| value)
    }

    /// The value that was there before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        match self.place(&key) {
            Ok(place) => self.0.get_mut(place).map(|(_, known)| std::mem::replace(known, value)),
            Err(place) => {
                self.0.reserve_exact(1);
                self.0.insert(place, (key, value));
                None
            }
        }
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let place = self.place(key).ok()?;
        let (_, value) = self.0.remove(place);
        self.0.shrink_to_fit();
        Some(value)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn place<Q: Ord + ?Sized>(&self, key: &Q) -> Result<usize, usize>
    where
        K: Borrow<Q>,
    {
        self.0.binary_search_by(|(known, _)| known.borrow().cmp(key))
    }
}

impl<K: Ord, V> FromIterator<(K, V)> for SmallMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        for (key, value) in entries {
            map.insert(key, value);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::v1alpha1::Microservice,
        controllers::{fixtures, store::live::ChildSeen},
    };

    #[test]
    fn what_is_packed_is_unpacked_as_it_was() {
        let object: Microservice =
            fixtures::microservice("orders", "{image: shop/orders:1, database: {postgres: {version: '17'}}}");
        assert_eq!(Packed::new(&object).unpack(), Some(object));
        let seen = ChildSeen { uid: "1".to_owned(), ours: u64::MAX, generation: 3, ..ChildSeen::default() };
        assert_eq!(Packed::new(&seen).unpack(), Some(seen));
    }

    #[test]
    fn a_small_map_is_sorted_and_has_no_spare_room() {
        let mut map: SmallMap<String, u32> =
            [("b", 1), ("a", 2), ("c", 3), ("a", 4)].map(|(k, v)| (k.to_owned(), v)).into_iter().collect();
        assert_eq!(
            map.iter().map(|(key, value)| (key.as_str(), *value)).collect::<Vec<_>>(),
            [("a", 4), ("b", 1), ("c", 3)]
        );
        assert_eq!((map.get("b"), map.get("d")), (Some(&1), None));
        assert_eq!((map.insert("b".to_owned(), 9), map.remove("c"), map.remove("c")), (Some(1), Some(3), None));
        assert_eq!((map.0.len(), map.0.capacity()), (2, 2));
        assert!(!map.is_empty());
    }
}
