//! What is reconciled, what it becomes, and the vocabulary that every other part of the operator shares. Pure data.

pub mod child;
pub mod fields;
pub mod key;
pub mod labels;
pub mod observed;
pub mod outcome;
pub mod plan;
pub mod reason;
pub mod settings;
