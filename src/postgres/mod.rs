//! Shared by everything that uses PostgreSQL: logging in, and the streaming replication protocol.

pub mod login;
pub mod replication;
