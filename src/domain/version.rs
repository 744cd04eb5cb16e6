//! Versions that are hashes of the content that they identify.

use serde::Serialize;
use sha2::{Digest, Sha256};

/// The version of `content`: a hash of its JSON, members in the order of their declaration.
pub fn of(content: &impl Serialize) -> String {
    // serializing strings, numbers, and maps and enums of them cannot fail
    short_hash(&serde_json::to_vec(content).unwrap_or_default(), 16)
}

/// Sets the `version` of `content` from all the rest of it.
#[must_use]
pub fn seal<T: Serialize>(mut content: T, version: fn(&mut T) -> &mut String) -> T {
    version(&mut content).clear();
    *version(&mut content) = of(&content);
    content
}

/// The first 8 bytes of the SHA-256.
pub fn hash64(text: &[u8]) -> u64 {
    Sha256::digest(text).first_chunk().copied().map_or(0, u64::from_be_bytes)
}

/// FNV-1a, 64 bits (<http://www.isthe.com/chongo/tech/comp/fnv/>): the same in every version, since it is kept in databases.
pub fn fnv1a<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// First `digits` hex digits of the SHA-256 of `text`.
pub fn short_hash(text: &[u8], digits: usize) -> String {
    let mut hash = format!("{:x}", Sha256::digest(text));
    hash.truncate(digits);
    hash
}
