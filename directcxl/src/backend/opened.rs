//! What every backend of this crate is made of: something that is open, and what is known of it.

use std::fs::File;

use super::{Geometry, Identity};
use crate::HostId;
use crate::error::{Error, Result};

/// An open file or device.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) geometry: Geometry,
    pub(super) identity: Identity,
    pub(super) host: HostId,
}

impl Opened {
    /// Takes over what the user has said of another one, which is the same one opened before.
    pub(super) fn as_said_of(&mut self, other: &Self) {
        self.host = other.host;
        self.geometry.coherence = other.geometry.coherence;
    }
}

/// Refuses what is not a regular file: only those have pages of their own to map.
pub(super) fn regular(file: &File, place: &str) -> Result<std::fs::Metadata> {
    let metadata = file.metadata().map_err(Error::io("look at", place))?;
    if metadata.is_file() {
        return Ok(metadata);
    }
    Err(Error::BadGeometry {
        place: place.to_owned(),
        why: "it is not a regular file".to_owned(),
        fix: "use `DevDax` for a device".to_owned(),
    })
}

/// What a user says of a backend with a field `opened`.
macro_rules! sayings {
    ($backend:ty) => {
        impl $backend {
            /// Says which of several hosts this is. Host 0 without it.
            #[must_use]
            pub fn on_host(mut self, host: $crate::HostId) -> Self {
                self.opened.host = host;
                self
            }

            /// Says who keeps the hosts' caches coherent. Hardware without it, which is right for
            /// one host.
            #[must_use]
            pub fn coherence(mut self, coherence: $crate::backend::Coherence) -> Self {
                self.opened.geometry.coherence = coherence;
                self
            }
        }
    };
}

/// The part of [`Backend`](super::Backend) that a field `opened` answers.
macro_rules! answers {
    () => {
        fn geometry(&self) -> &$crate::backend::Geometry {
            &self.opened.geometry
        }

        fn identity(&self) -> &$crate::backend::Identity {
            &self.opened.identity
        }

        fn host(&self) -> $crate::HostId {
            self.opened.host
        }

        fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
            std::os::fd::AsFd::as_fd(&self.opened.file)
        }

        fn map(
            self: std::sync::Arc<Self>,
            range: std::ops::Range<u64>,
            access: $crate::medium::Access,
            populate: bool,
        ) -> $crate::error::Result<Box<dyn $crate::medium::Medium>> {
            let backend: std::sync::Arc<dyn Backend> = std::sync::Arc::clone(&self) as _;
            let fd = std::os::fd::AsFd::as_fd(&self.opened.file);
            let memory = $crate::medium::Memory::map(backend, fd, range, access, populate)?;
            Ok(Box::new(memory))
        }
    };
}

pub(super) use {answers, sayings};
