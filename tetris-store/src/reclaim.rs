//! The reclaimer: freeing what nobody has used for a while.
//!
//! A model is freed when nobody holds a lease on it and its idle time is over; a stored file when
//! no model needs it, no view shows it, and the same time has passed since it was last stored or
//! found stored. The second half spares what an ingest has stored for a model to be.
//!
//! A sweep holds the store's lock exclusively, so that no model is published meanwhile that needs
//! what is being freed; attaching goes on.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use carlsbad_types::ByteSize;
use nix::fcntl::OFlag;

use serde::{Deserialize, Serialize};

use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::label;
use crate::lease::mark_in_use;
use crate::lifecycle::{Event, IllegalTransition, Lifecycle, Moment};
use crate::lock::{Lock, try_lock};
use crate::manifest::Manifest;
use crate::regular;
use crate::stamp;
use crate::store::{Inner, Store};
use crate::view;

/// What a sweep did and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimReport {
    /// Models it freed.
    pub freed: Vec<ModelId>,
    /// Stored files it freed.
    pub freed_objects: usize,
    /// Memory they took; it returns to the machine when the last process that has them mapped ends.
    pub freed_bytes: ByteSize,
    /// Models that somebody holds a lease on.
    pub leased: usize,
    /// Models and stored files that nobody uses, but not for long enough.
    pub idle: usize,
    /// Stored files that only views use.
    pub viewed: usize,
    /// Left behind by processes that died: claims, reservations, links, views.
    pub stale: usize,
    /// When the next sweep may find something to free, if nothing is used before.
    #[serde(rename = "next_due_seconds", with = "crate::seconds")]
    pub next_due: Option<Duration>,
    /// Models whose manifests cannot be read. While one of them is kept no stored file is freed:
    /// it may be one of its own.
    pub damaged: Vec<ModelId>,
}

impl Store {
    /// Frees what nobody has used for the configured keep-alive time: one sweep.
    ///
    /// # Errors
    /// [`Error::ReadOnly`]; [`Error::Busy`] where commits or another sweep held the store's lock
    /// for longer than the configured patience; [`Error::Io`].
    pub fn reclaim(&self) -> Result<ReclaimReport> {
        let inner = &self.inner;
        let _no_commits = inner.root.lock(Lock::Exclusive, inner.config.patience)?;
        let mut sweep = Sweep {
            inner,
            needed: HashSet::new(),
            report: ReclaimReport::default(),
        };
        for id in self.model_ids()? {
            sweep.model(&id)?;
        }
        if sweep.report.damaged.is_empty() {
            sweep.objects()?;
        }
        sweep.labels()?;
        sweep.stale()?;
        Ok(sweep.report)
    }
}

struct Sweep<'a> {
    inner: &'a Inner,
    /// Stored files of the models that are kept.
    needed: HashSet<ObjectId>,
    report: ReclaimReport,
}

impl Sweep<'_> {
    fn model(&mut self, id: &ModelId) -> Result<()> {
        let path = self.inner.root.model(id);
        let mut file = match regular::open(&path) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(()),
            Err(error @ Error::Damaged { .. }) => {
                tracing::warn!(%error, "a damaged manifest");
                self.report.damaged.push(*id);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let exclusive = try_lock(&file, Lock::Exclusive, &path)?;
        let stamp = modified(&file, &path)?;
        // Of this look, not of the sweep's beginning: a lease may have ended since.
        let now = stamp::now()?;
        let state = Lifecycle::seen(!exclusive, stamp, now);
        if self.is_due(state, now) {
            // Under the lock: whoever takes a lease from here on finds that the name is gone.
            fs::remove_file(&path).map_err(Error::io("free", &path))?;
            self.report.freed.push(*id);
            return Ok(());
        }
        if state == Lifecycle::Leased {
            self.report.leased += 1;
            if stamp != Moment::IN_USE {
                mark_in_use(&file, &path);
            }
        } else if stamp > now {
            stamp::write(&file, now).map_err(Error::io("stamp", &path))?;
        }
        match regular::read(&mut file, &path).and_then(|bytes| Manifest::decode(&bytes)) {
            Ok(manifest) => self.needed.extend(manifest.objects()),
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a damaged manifest");
                self.report.damaged.push(*id);
            }
        }
        Ok(())
    }

    /// Whether what is in `state` is to be freed; notes it if not.
    fn is_due(&mut self, state: Lifecycle, now: Moment) -> bool {
        let keep_alive = self.inner.config.keep_alive;
        match state.step(Event::ReclaimBegun { keep_alive }, now) {
            Ok(_reclaiming) => true,
            Err(IllegalTransition::TooEarly { due }) => {
                self.report.idle += 1;
                let wait = due.since(now);
                let sooner = self.report.next_due.map_or(wait, |next| next.min(wait));
                self.report.next_due = Some(sooner);
                false
            }
            Err(IllegalTransition::NoSuchEdge { .. }) => false,
        }
    }

    fn objects(&mut self) -> Result<()> {
        for object in self.inner.backing.list()? {
            if self.needed.contains(&object.id) {
                continue;
            }
            if object.views > 0 {
                self.report.viewed += 1;
                self.inner.backing.touch(&object.id, Moment::IN_USE)?;
                continue;
            }
            let now = stamp::now()?;
            if self.is_due(Lifecycle::seen(false, object.stamp, now), now) {
                self.inner.backing.evict(&object.id)?;
                self.report.freed_objects += 1;
                self.report.freed_bytes += object.bytes;
            } else if object.stamp > now {
                self.inner.backing.touch(&object.id, now)?;
            }
        }
        if self.report.freed_objects > 0 {
            self.inner
                .hints
                .forget(|id| self.inner.backing.contains(id))?;
        }
        Ok(())
    }

    /// Labels of models that are gone.
    fn labels(&self) -> Result<()> {
        for (label, model) in label::all(&self.inner.root)? {
            if !self.inner.root.model(&model).exists() {
                label::remove(&self.inner.root, &label)?;
            }
        }
        Ok(())
    }

    /// What dead processes left in `tmp`: files that nobody has locked, and links that were to
    /// replace others, which take microseconds, after a minute.
    fn stale(&mut self) -> Result<()> {
        self.report.stale += view::sweep_unfinished(&self.inner.root.tmp())?;
        for entry in read_dir(&self.inner.root.tmp())? {
            let path = entry.path();
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            let stale = if kind.is_symlink() {
                let made = fs::symlink_metadata(&path).and_then(|link| link.modified());
                made.is_ok_and(|made| {
                    made.elapsed()
                        .is_ok_and(|age| age > Duration::from_secs(60))
                })
            } else {
                kind.is_file() && is_abandoned(&path)?
            };
            if stale {
                self.report.stale += 1;
            }
            if stale && kind.is_symlink() {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether nobody has locked the file at `path`; it is removed then, while nobody can.
fn is_abandoned(path: &Path) -> Result<bool> {
    match abandoned(path)? {
        Some(_lock) => remove(path).map(|()| true),
        None => Ok(false),
    }
}

/// The file at `path`, locked, if nobody else has locked it.
pub(crate) fn abandoned(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path);
    let Ok(file) = opened else {
        return Ok(None);
    };
    if !try_lock(&file, Lock::Exclusive, path)? {
        return Ok(None);
    }
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    Ok(match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(locked), Ok(named)) if same(&locked, &named) => Some(file),
        _ => None,
    })
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn modified(file: &File, path: &Path) -> Result<Moment> {
    file.metadata()
        .and_then(|metadata| metadata.modified())
        .map(stamp::read)
        .map_err(Error::io("look at", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreConfig;

    #[test]
    fn a_lease_that_ends_during_a_long_sweep_begins_its_idle_time_then() {
        const LONG: Duration = Duration::from_secs(2);
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = dir.path().join("model.safetensors");
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![4], &[1; 4]);
        safetensors::serialize_to_file([("a", view.unwrap())], None, &file).unwrap();
        let mut config = StoreConfig::at(dir.path().join("store"));
        config.keep_alive = LONG;
        let store = Store::open(config).unwrap();
        let source = crate::open_model(&file).unwrap();
        let id = store.ingest(&*source).unwrap().model;
        let shared = store.attach(&id).unwrap();
        let mut sweep = Sweep {
            inner: &store.inner,
            needed: HashSet::new(),
            report: ReclaimReport::default(),
        };
        // The sweep is busy with other models.
        std::thread::sleep(LONG);
        drop(shared);
        let ended = std::time::Instant::now();
        sweep.model(&id).unwrap();
        assert_eq!(sweep.report.freed, [], "freed before its time");
        let report = store.reclaim().unwrap();
        assert!(ended.elapsed() < LONG, "this machine is too slow to tell");
        assert_eq!(report.freed, [], "freed before its time");
        assert!(report.next_due.unwrap() > LONG - ended.elapsed());
    }
}
