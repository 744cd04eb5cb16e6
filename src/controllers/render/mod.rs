//! Building blocks of the objects that Weft makes. Pure.

pub mod broker;
pub mod network;
pub mod overlay;
pub mod owner;
pub mod pod;
pub mod reach;
