//! The protocol: one packet a message, JSON behind a version mark, with descriptors where noted.
//!
//! A client says [`Request::Hello`] first. Each request but [`Request::Detach`] gets one reply; an
//! ingest gets any number
//! of [`Reply::Progress`] before it. What may be long (manifests, lists) comes as a sealed memfd.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::ingest::Ingested;
use crate::lifecycle::Lifecycle;
use crate::manifest::SourceFormat;
use crate::reclaim::ReclaimReport;
use crate::store::{Stats, Store};
use crate::view::{View, ViewKind};

/// In front of every packet. The digit changes when a message changes its meaning.
pub(super) const MARK: &[u8; 8] = b"tetris1\n";
/// Longest packet. What a client can make the agent hold is a few of them.
pub(super) const MAX_PACKET: usize = 64 << 10;
/// Most descriptors of one packet that anybody sends; the kernel's own limit is 253 (SCM_MAX_FD).
pub(super) const MAX_FILES: usize = 128;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// Which domain is meant.
    Hello {
        domain: String,
    },
    /// Files for the next ingest, one descriptor for each name.
    Files {
        names: Vec<String>,
    },
    /// Ingests the files sent before: the model in `main`, or the folder they make up.
    Ingest {
        label: Option<String>,
        main: Option<String>,
    },
    /// Takes a lease for this connection. The manifest comes as a memfd.
    Attach {
        model: String,
    },
    /// A stored file of a model this connection has a lease on. It comes as a descriptor.
    Open {
        model: ModelId,
        object: ObjectId,
    },
    /// Gives one lease on it back. The one request without a reply: whoever lets go does not wait.
    Detach {
        model: ModelId,
    },
    /// All models, as a memfd with a JSON list of [`Listed`].
    List,
    /// A manifest as a memfd, without a lease.
    Show {
        model: String,
    },
    Stats,
    /// Lets a model go by a label; the label is the user's own from then on.
    Label {
        label: String,
        model: String,
    },
    Unlabel {
        label: String,
    },
    /// Exports a view that is called `name` among the user's views.
    View {
        model: String,
        kind: ViewKind,
        name: String,
    },
    RemoveView {
        name: String,
    },
    /// A sweep, now. For root and the agent's own user.
    Reclaim,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Reply {
    Welcome {
        /// Where the agent has the store. The client may have it there as well, or not.
        root: PathBuf,
        /// Device and inode of that directory, to tell.
        identity: (u64, u64),
    },
    Done,
    Progress {
        done: ByteSize,
        total: ByteSize,
    },
    Ingested(Ingested),
    /// With one descriptor: a manifest, a list or a stored file.
    File,
    Attached {
        model: ModelId,
    },
    Stats(AgentStats),
    Exported(View),
    Reclaimed(ReclaimReport),
    Refused {
        kind: Refusal,
        message: String,
    },
}

/// What an agent has, and what of it is the asking user's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AgentStats {
    /// The store.
    pub store: Stats,
    /// What counts against the user's quota.
    pub yours: ByteSize,
    /// The most that may.
    pub quota_per_user: Option<ByteSize>,
    /// Connections in all.
    pub clients: usize,
}

/// A model in an agent's store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Listed {
    /// What it is.
    pub id: ModelId,
    /// Its labels, sorted.
    pub labels: Vec<String>,
    /// The format it came in.
    pub format: SourceFormat,
    /// How many tensors it has.
    pub tensors: usize,
    /// Bytes of all its tensors.
    pub bytes: ByteSize,
    /// How long it has been idle; `None` while somebody holds a lease on it.
    #[serde(rename = "idle_seconds", with = "crate::seconds")]
    pub idle: Option<Duration>,
}

impl Listed {
    /// All of `store`'s models.
    ///
    /// # Errors
    /// As [`Store::models`].
    pub fn all(store: &Store) -> Result<Vec<Self>> {
        let mut list = Vec::new();
        for model in store.models()? {
            let state = match store.state(&model.id) {
                Ok(state) => state,
                // Reclaimed meanwhile.
                Err(Error::UnknownModel { .. }) => continue,
                Err(error) => return Err(error),
            };
            let idle = match state {
                Lifecycle::Idle { since } => Some(Store::now()?.since(since)),
                _ => None,
            };
            list.push(Self {
                id: model.id,
                labels: model.labels,
                format: model.manifest.format,
                tensors: model.manifest.tensors.len(),
                bytes: model.manifest.byte_size(),
                idle,
            });
        }
        Ok(list)
    }
}

/// Why an agent refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Refusal {
    /// The user may not do that, or not in this domain.
    NotAllowed,
    /// The agent serves no such domain.
    UnknownDomain,
    /// There is no such model, label, view or stored file, or it is not the user's.
    Unknown,
    /// More connections, leases, files, ingests or views than one may have.
    TooMany,
    /// More bytes than the user may bring, or than there is room for.
    NoRoom,
    /// What was sent is no model, or cannot be read.
    BadModel,
    /// Somebody else holds what is needed; try again.
    Busy,
    /// The request makes no sense at this point or at all.
    Protocol,
    /// What was asked for cannot be done; the message says why.
    Failed,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::NotAllowed => "not allowed",
            Self::UnknownDomain => "unknown domain",
            Self::Unknown => "unknown",
            Self::TooMany => "too many",
            Self::NoRoom => "no room",
            Self::BadModel => "bad model",
            Self::Busy => "busy",
            Self::Protocol => "protocol",
            Self::Failed => "failed",
        })
    }
}

impl Reply {
    pub(super) fn refused(kind: Refusal, message: impl Into<String>) -> Self {
        let mut message = message.into();
        // Names from models and files may be in it: keep well below the size of a packet.
        if message.len() > 4096 {
            let end = (0..=4096).rev().find(|&i| message.is_char_boundary(i));
            message.truncate(end.unwrap_or(0));
        }
        Self::Refused { kind, message }
    }
}

impl From<Error> for Reply {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::AgentRefused { kind, .. } => *kind,
            Error::UnknownModel { .. }
            | Error::AmbiguousModel { .. }
            | Error::UnknownTensor { .. } => Refusal::Unknown,
            Error::QuotaExceeded { .. } | Error::NoSpace { .. } => Refusal::NoRoom,
            Error::BadModel { .. }
            | Error::NotAModel { .. }
            | Error::NotAFile { .. }
            | Error::OutsideModel { .. }
            | Error::BadShape { .. }
            | Error::BadManifest { .. } => Refusal::BadModel,
            Error::Busy { .. } => Refusal::Busy,
            _ => Refusal::Failed,
        };
        Self::refused(kind, error.to_string())
    }
}

impl Refusal {
    /// For `?`: refuse with this.
    pub(super) fn because(self, message: impl Into<String>) -> Error {
        Error::AgentRefused {
            kind: self,
            message: message.into(),
        }
    }
}
