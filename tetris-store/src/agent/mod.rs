//! The agent: one process a machine that fills, reclaims and hands out for others (feature
//! `daemon`).
//!
//! | file | what |
//! |---|---|
//! | `wire` | the protocol: requests, replies, version |
//! | `channel` | packets with descriptors over a Unix socket |
//! | `server` | the socket, who may connect, threads, shutdown |
//! | `session` | what one client asks, and what it holds |
//! | `owners` | whose models and labels those are, and how much each user may bring |
//! | `watch` | sweeps, and idle times of models attached through read-only mounts |
//! | `client` | the other end |
//!
//! Why one would run it: clients may have the store mounted read-only, or not at all; what is
//! filled is charged to the agent's cgroup and not to whoever came first; and it sweeps.
//!
//! What a client holds through it, it loses when it hangs up, however it ends. A client can waste
//! its own time, its own quota and a bounded number of the agent's threads. A view is charged to
//! whom it belongs to; a lease is not: while anybody uses a model it counts for who brought it.

mod channel;
mod client;
mod owners;
mod server;
mod session;
mod watch;
mod wire;

use std::path::PathBuf;
use std::time::Duration;

use carlsbad_types::ByteSize;

pub use client::{Client, ClientConfig};
pub use server::{Agent, StopHandle};
pub use wire::{AgentStats, Listed, Refusal};

use crate::store::StoreConfig;

/// What an agent serves, to whom, and within which limits.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where its socket is made. Everybody may connect; who connects is known by the kernel's word
    /// (`SO_PEERCRED`), not by its own.
    pub socket: PathBuf,
    /// The stores it serves, one a domain.
    pub domains: Vec<Served>,
    /// What clients may take.
    pub limits: Limits,
    /// How often it sweeps; what dies is freed that much after its keep-alive time at the latest.
    pub sweep_every: Duration,
}

/// One store that an agent serves.
#[derive(Debug, Clone)]
pub struct Served {
    /// How it is opened. Clients name it by its domain.
    pub store: StoreConfig,
    /// Who may use it, besides root and the agent's own user.
    pub access: Access,
    /// The most that one user may have brought or keep in views, counted by the models' full sizes:
    /// what others have as well is not told apart, so nobody learns from his quota what others have.
    pub quota_per_user: Option<ByteSize>,
}

/// Who may use a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Everybody who can reach the socket.
    Everyone,
    /// These users, and those whose primary group is one of these.
    Only {
        /// User ids, as the agent's user namespace knows them.
        users: Vec<u32>,
        /// Group ids.
        groups: Vec<u32>,
    },
}

/// What clients may take of an agent.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections in all.
    pub clients: usize,
    /// Connections of one user.
    pub clients_per_user: usize,
    /// Ingests of one user at a time.
    pub ingests_per_user: usize,
    /// Files of one user that are to be ingested, those of all his connections together.
    pub files_per_user: usize,
    /// Leases of one user.
    pub leases_per_user: usize,
    /// Views of one user.
    pub views_per_user: usize,
    /// Time from connecting to the first request, and for a client to take in a reply.
    pub patience: Duration,
    /// Time after which a connection that holds nothing and asks nothing is closed.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 512,
            clients_per_user: 128,
            ingests_per_user: 4,
            files_per_user: 1_024,
            leases_per_user: 2_048,
            views_per_user: 64,
            patience: Duration::from_secs(5),
            idle: Duration::from_secs(300),
        }
    }
}

impl AgentConfig {
    /// The defaults: `store` for everybody, at `socket`.
    pub fn new(socket: impl Into<PathBuf>, store: StoreConfig) -> Self {
        Self {
            socket: socket.into(),
            domains: vec![Served {
                store,
                access: Access::Everyone,
                quota_per_user: None,
            }],
            limits: Limits::default(),
            sweep_every: Duration::from_millis(500),
        }
    }
}
