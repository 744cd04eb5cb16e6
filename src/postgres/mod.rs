//! What every part that talks to PostgreSQL shares: logging in, and the streaming replication protocol.

pub mod login;
pub mod replication;
