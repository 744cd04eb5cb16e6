//! What an object reports of itself: conditions, one finding of its progress, and the Events that a change is worth. Pure.

pub mod conditions;
pub mod events;
pub mod progress;
