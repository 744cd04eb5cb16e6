//! Names of content: versions that are made of what they are versions of.

use serde::Serialize;
use sha2::{Digest, Sha256};

/// Of the content as JSON, members in the order of their declaration.
pub fn of(content: &impl Serialize) -> String {
    // strings, numbers, and maps and enums of them always have a form in JSON
    short_hash(&serde_json::to_vec(content).unwrap_or_default(), 16)
}

/// First `digits` hex digits of the SHA-256 of `text`.
pub fn short_hash(text: &[u8], digits: usize) -> String {
    let mut hash = format!("{:x}", Sha256::digest(text));
    hash.truncate(digits);
    hash
}
