//! How the store keeps what it knows of thousands of objects in little memory.

use std::{borrow::Borrow, marker::PhantomData};

use lz4_flex::block::{DecompressError, compress_prepend_size_with_dict, decompress_size_prepended_with_dict};
use serde::{Serialize, de::DeserializeOwned};

/// What the packed values have in common. The objects of a cluster are alike, so each is kept as its difference from some that were
/// packed before it: LZ4 refers to them as to text that it has already seen.
#[derive(Default)]
pub struct Dictionary(Vec<u8>);

impl Dictionary {
    /// It is gone through for each value that is packed.
    const MOST: usize = 16 << 10;
    /// What does not become so much smaller has news in it.
    const GAIN: usize = 3;

    fn pack(&mut self, plain: &[u8]) -> Box<[u8]> {
        let packed = self.difference(plain);
        if packed.len() * Self::GAIN <= plain.len() || self.0.len() + plain.len() > Self::MOST {
            return packed;
        }
        self.0.extend_from_slice(plain);
        self.difference(plain)
    }

    /// Begins with how much of the dictionary it refers to: that only grows.
    fn difference(&self, plain: &[u8]) -> Box<[u8]> {
        let known = u16::try_from(self.0.len()).unwrap_or_default();
        let mut packed = known.to_le_bytes().to_vec();
        packed.append(&mut compress_prepend_size_with_dict(plain, self.known(known)));
        packed.into_boxed_slice()
    }

    fn unpack(&self, packed: &[u8]) -> Result<Vec<u8>, DecompressError> {
        let (known, packed) = packed.split_first_chunk().ok_or(DecompressError::ExpectedAnotherByte)?;
        decompress_size_prepended_with_dict(packed, self.known(u16::from_le_bytes(*known)))
    }

    fn known(&self, length: u16) -> &[u8] {
        self.0.get(..length.into()).unwrap_or_default()
    }
}

impl std::fmt::Debug for Dictionary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

/// A value as its JSON, compressed: a small part of what the parsed one takes, in one allocation. For what is read rarely: an
/// object is unpacked when it is reconciled.
pub struct Packed<T> {
    bytes: Box<[u8]>,
    of: PhantomData<fn() -> T>,
}

impl<T: Serialize + DeserializeOwned> Packed<T> {
    pub fn new(value: &T, dictionary: &mut Dictionary) -> Self {
        // what came as JSON always has a form in JSON
        let json = serde_json::to_vec(value).unwrap_or_default();
        Self { bytes: dictionary.pack(&json), of: PhantomData }
    }

    /// `None` never happens: it is the JSON of a value of this type, packed by this dictionary.
    pub fn unpack(&self, dictionary: &Dictionary) -> Option<T> {
        let json = dictionary.unpack(&self.bytes).map_err(anyhow::Error::from);
        json.and_then(|json| Ok(serde_json::from_slice(&json)?))
            .inspect_err(|error| tracing::error!(%error, "what the store keeps cannot be read"))
            .ok()
    }
}

impl<T> std::fmt::Debug for Packed<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes.len())
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
        let mut dictionary = Dictionary::default();
        let object: Microservice =
            fixtures::microservice("orders", "{image: shop/orders:1, database: {postgres: {version: '17'}}}");
        let packed = Packed::new(&object, &mut dictionary);
        let seen = ChildSeen { uid: "1".to_owned(), ours: u64::MAX, generation: 3, ..ChildSeen::default() };
        assert_eq!(Packed::new(&seen, &mut dictionary).unpack(&dictionary), Some(seen));
        assert_eq!(packed.unpack(&dictionary), Some(object), "the dictionary has grown since");
    }

    #[test]
    fn objects_that_are_alike_take_little_and_odd_ones_no_dictionary_without_end() {
        let mut dictionary = Dictionary::default();
        let alike = |number: usize| fixtures::microservice(&format!("service-{number}"), "image: shop/orders:1");
        let packed: Vec<_> = (0..100).map(|number| Packed::new(&alike(number), &mut dictionary)).collect();
        let plain = serde_json::to_vec(&alike(99)).unwrap();
        assert!(packed[99].bytes.len() * 4 < plain.len(), "{} of {}", packed[99].bytes.len(), plain.len());
        let odd = |number: u64| {
            (0..400).map(|place| (place + number).wrapping_mul(0x9E37_79B9_7F4A_7C15)).collect::<Vec<_>>()
        };
        let odd_ones: Vec<_> = (0..20).map(|number| Packed::new(&odd(number * 1000), &mut dictionary)).collect();
        assert!(dictionary.0.len() <= Dictionary::MOST);
        assert_eq!(odd_ones[19].unpack(&dictionary), Some(odd(19_000)));
        assert_eq!(packed[99].unpack(&dictionary), Some(alike(99)));
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
