//! Two services that place an order together: `orders` accepts it, `customers` reserves credit for it.
//!
//! ```text
//! POST /orders ─► orders ── OrderCreated ─► saga create-order ─► customers: reserve-credit ─► orders: approve-order
//!                 PENDING                        └─ refused ──────────────────────────────► orders: reject-order
//! ```
//! Each has its own database. They share no tables and no transaction; they agree through events and commands:
//!
//! - [`outbox`]: an event is a row, written in the transaction that changes the data.
//! - [`saga`]: a command takes effect once, however often it is sent, and can be undone.
//! - `customers` handles each event once, through `weft.receive`.

#![deny(unreachable_pub)]

pub mod customers;
pub mod orders;
pub mod outbox;
pub mod reply;
pub mod saga;
pub mod server;
