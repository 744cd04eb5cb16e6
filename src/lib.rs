//! Weft: a database per service, reliable events, and transactions across services, on Kubernetes.
//!
//! ```text
//!            control plane                          data plane (never imports kube)
//!   api ──► controllers ──► contract (files) ──► database   relay   inbox   saga
//!              │                                     │        │       │       │
//!              └───────────► domain ◄────────────────┴────────┴───────┴───────┘
//!                       (pure rules, no IO)          all through `postgres`, `nats`
//! ```
//! `tests/architecture.rs` holds the direction of these arrows.

pub mod admin;
pub mod api;
pub mod broker;
pub mod cli;
pub mod contract;
pub mod controllers;
pub mod crds;
pub mod database;
pub mod dead_letters;
pub mod domain;
pub mod inbox;
pub mod metrics;
pub mod nats;
pub mod outage;
pub mod output;
pub mod postgres;
pub mod relay;
pub mod reload;
pub mod saga;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
