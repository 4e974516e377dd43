//! Whom to ask: the store itself, or an agent.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::Context;

use tetris_store::agent::{Client, ClientConfig};
use tetris_store::{Domain, Error, Manifest, Store, StoreConfig};

use crate::options::Global;

pub(crate) fn socket_from_env() -> Option<PathBuf> {
    let socket = env::var_os("TETRIS_AGENT").filter(|it| !it.is_empty());
    socket.map(PathBuf::from)
}

pub(crate) enum Backend {
    Store(Store),
    Agent(Client),
}

impl Global {
    pub(crate) fn root(&self) -> PathBuf {
        self.store
            .clone()
            .or_else(|| env::var_os("TETRIS_STORE").map(PathBuf::from))
            .unwrap_or_else(|| Path::new("/dev/shm/tetris").to_owned())
    }

    pub(crate) fn socket(&self) -> Option<PathBuf> {
        // A store that is named is meant, whatever the environment says.
        let from_env = || match &self.store {
            Some(_) => None,
            None => socket_from_env(),
        };
        self.agent.clone().or_else(from_env)
    }

    pub(crate) fn domain(&self) -> Domain {
        Domain::new(self.domain.clone())
    }

    pub(crate) fn store_config(&self) -> StoreConfig {
        StoreConfig {
            domain: self.domain(),
            ..StoreConfig::at(self.root())
        }
    }

    /// The store itself, which must be there: asking what is in it makes none.
    pub(crate) fn store(&self, change: impl FnOnce(&mut StoreConfig)) -> anyhow::Result<Store> {
        let root = self.root();
        if !root.join("FORMAT").exists() {
            return Err(Error::NotAStore {
                path: root,
                why: "there is none yet: ingest a model, or name another one with --store".into(),
            }
            .into());
        }
        self.new_store(change)
    }

    /// The store itself, which is made where there is none.
    pub(crate) fn new_store(&self, change: impl FnOnce(&mut StoreConfig)) -> anyhow::Result<Store> {
        let mut config = self.store_config();
        change(&mut config);
        Ok(Store::open(config)?)
    }

    pub(crate) fn backend(&self) -> anyhow::Result<Backend> {
        let Some(socket) = self.socket() else {
            return Ok(Backend::Store(self.store(|_| {})?));
        };
        let config = ClientConfig {
            domain: self.domain(),
            ..ClientConfig::at(socket)
        };
        Ok(Backend::Agent(Client::connect(config)?))
    }
}

impl Backend {
    /// The store itself, or the agent's where it is to be seen here.
    pub(crate) fn visible_store(&self) -> anyhow::Result<&Store> {
        match self {
            Self::Store(store) => Ok(store),
            Self::Agent(client) => client.store().context(
                "the agent's store is not mounted here, and it has to be read: run this where the \
                 agent runs, or name the store with --store and no --agent",
            ),
        }
    }

    pub(crate) fn manifest(&self, model: &str) -> anyhow::Result<Manifest> {
        Ok(match self {
            Self::Store(store) => store.manifest(&store.resolve(model)?)?,
            Self::Agent(client) => client.manifest(model)?,
        })
    }
}
