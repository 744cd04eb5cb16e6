//! What every part that talks to PostgreSQL shares: logging in.

pub mod login;
