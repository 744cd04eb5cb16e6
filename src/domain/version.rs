//! Versions that are made of what they are versions of.

use std::fmt::Write;

use serde::Serialize;
use sha2::{Digest, Sha256};

/// The first 16 hexadecimal digits of the SHA-256 of the content as JSON, members in the order of their declaration.
pub fn of(content: &impl Serialize) -> String {
    // strings, numbers, and maps and enums of them always have a form in JSON
    let canonical = serde_json::to_vec(content).unwrap_or_default();
    Sha256::digest(&canonical).iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
