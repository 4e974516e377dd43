//! What goes on by itself: sweeps, and noticing those who attach through a read-only mount.
//!
//! They cannot stamp a manifest, and one who comes and goes between two sweeps leaves no trace of
//! his lease. So whoever takes a lease without being able to stamp opens a file of that model in
//! `seen/`, and keeps it open; the agent is told by inotify when that is opened and, however its
//! holder ends, closed. Nobody else opens those: looking at a manifest does not count as use.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::ModelId;
use crate::lease::{begin_idle_time, mark_in_use, seen_file};
use crate::regular::{self, make_dir};
use crate::store::Store;

/// Watches the models of several stores.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    /// Directories by watch descriptor.
    watched: HashMap<i32, (Store, Watched)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    /// Where manifests appear.
    Models,
    /// Where leases show.
    Seen,
}

impl Watch {
    pub(super) fn new(stores: impl IntoIterator<Item = Store>) -> Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(Error::io("watch", "models"))?;
        let mut watched = HashMap::new();
        for store in stores {
            let seen = store.root().join("seen");
            make_dir(&seen, 0o755).map_err(Error::io("create", &seen))?;
            let models = store.inner.root.models();
            let opened = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_CLOSE_NOWRITE;
            let new = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
            // First the watch, then the look at what is there: nothing falls between.
            for (dir, mask, what) in [
                (&seen, opened, Watched::Seen),
                (&models, new, Watched::Models),
            ] {
                let descriptor = inotify
                    .add_watch(dir, mask)
                    .map_err(Error::io("watch", dir))?;
                watched.insert(descriptor.as_raw(), (store.clone(), what));
            }
            for model in store.model_ids()? {
                make_visible(&store.inner.root.model(&model));
            }
        }
        Ok(Self { inotify, watched })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Takes in what has happened.
    pub(super) fn notice(&self) {
        loop {
            match self.inotify.read_events() {
                Ok(events) => events.iter().for_each(|event| self.one(event)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot see who attaches: idle times may be short");
                    return;
                }
            }
        }
    }

    fn one(&self, event: &InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            // More than the kernel kept for us: any of them may have been used.
            for (store, _) in self.watched.values() {
                for model in store.model_ids().unwrap_or_default() {
                    let manifest = store.inner.root.model(&model);
                    make_visible(&manifest);
                    begin_idle_time(&manifest);
                }
            }
            return;
        }
        let Some((store, what)) = self.watched.get(&event.wd.as_raw()) else {
            return;
        };
        let Some(manifest) = manifest_of(store, event.name.as_deref()) else {
            return;
        };
        match what {
            Watched::Models => make_visible(&manifest),
            Watched::Seen if event.mask.contains(AddWatchFlags::IN_OPEN) => {
                if let Ok(Some(file)) = regular::open(&manifest) {
                    mark_in_use(&file, &manifest);
                }
            }
            Watched::Seen => begin_idle_time(&manifest),
        }
    }

    /// Removes what stands for models that are gone.
    pub(super) fn tidy(store: &Store) -> Result<()> {
        for entry in read_dir(&store.root().join("seen"))? {
            let name = entry.file_name();
            let manifest = manifest_of(store, Some(&name));
            if manifest.is_some_and(|manifest| manifest.exists()) {
                continue;
            }
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("remove", entry.path())(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn manifest_of(store: &Store, name: Option<&OsStr>) -> Option<PathBuf> {
    let model: ModelId = name?.to_str()?.parse().ok()?;
    Some(store.inner.root.model(&model))
}

/// Makes the file by which leases on the model at `manifest` are seen. Not by opening it, which
/// would look like one.
fn make_visible(manifest: &Path) {
    let path = seen_file(manifest);
    let everybody = Mode::S_IRUSR | Mode::S_IRGRP | Mode::S_IROTH;
    match mknod(&path, SFlag::S_IFREG, everybody, 0) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "leases on this model may go unseen");
        }
    }
}
