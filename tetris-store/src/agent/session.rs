//! One client: what it asks, and what it holds until it hangs up.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

use super::channel::{Channel, Received, sealed};
use super::server::{Domain, Peer, Share, Shared, Taken};
use super::wire::{AgentStats, Listed, MAX_FILES, Refusal, Reply, Request};
use crate::attach::SharedModel;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::ingest::{IngestOptions, Progress};
use crate::label;
use crate::source::open_model_of;
use crate::view::ViewKind;

/// How often a client hears how far its ingest is.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

pub(super) struct Session<'a> {
    shared: &'a Arc<Shared>,
    channel: &'a Channel,
    peer: Peer,
    /// What it said hello to.
    domain: Option<&'a Domain>,
    /// For the next ingest.
    files: Vec<(String, File)>,
    file_shares: Vec<Share>,
    leases: HashMap<ModelId, Held>,
}

struct Held {
    model: SharedModel,
    /// One for each time it attached.
    shares: Vec<Share>,
}

/// A reply, and a file that goes with it.
type Answer = (Reply, Option<OwnedFd>);

impl<'a> Session<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, channel: &'a Channel, peer: Peer) -> Self {
        Self {
            shared,
            channel,
            peer,
            domain: None,
            files: Vec::new(),
            file_shares: Vec::new(),
            leases: HashMap::new(),
        }
    }

    /// Serves the client until it hangs up, is silent for too long, or talks nonsense.
    pub(super) fn run(mut self) {
        let limits = &self.shared.config.limits;
        loop {
            let received = match self.channel.receive::<Request>() {
                Ok(received) => received,
                Err(error) => {
                    tracing::debug!(%error, "a client's connection broke");
                    return;
                }
            };
            let answer = match received {
                Received::HungUp => return,
                // Whoever holds leases may be silent for as long as it uses them.
                Received::Silence if !self.leases.is_empty() => continue,
                Received::Silence => return,
                Received::Garbage(why) => {
                    let refused = Reply::refused(Refusal::Protocol, why);
                    let _ = self.channel.send(&refused, &[], false);
                    return;
                }
                Received::Message(Request::Detach { model }, _) => {
                    self.detach(&model);
                    continue;
                }
                Received::Message(request, files) => self.answer(request, files),
            };
            let known = self.domain.is_some();
            let (reply, file) = answer.unwrap_or_else(|error| (Reply::from(error), None));
            let files: Vec<_> = file.iter().map(AsFd::as_fd).collect();
            if let Err(error) = self.channel.send(&reply, &files, true) {
                tracing::debug!(%error, "a client does not take in its replies");
                return;
            }
            // One chance to say hello.
            if !known
                || self
                    .channel
                    .set_deadlines(limits.idle, limits.patience)
                    .is_err()
            {
                return;
            }
        }
    }

    fn answer(&mut self, request: Request, files: Vec<OwnedFd>) -> Result<Answer> {
        if !files.is_empty() && !matches!(request, Request::Files { .. }) {
            return Err(Refusal::Protocol.because("this request takes no files"));
        }
        if let Request::Hello { domain } = request {
            return self.hello(&domain).map(plain);
        }
        let Some(domain) = self.domain else {
            return Err(Refusal::Protocol.because("say hello first"));
        };
        let store = &domain.store;
        Ok(match request {
            Request::Hello { .. } | Request::Detach { .. } => {
                return Err(Refusal::Protocol.because("that was answered already"));
            }
            Request::Files { names } => plain(self.take_files(names, files)?),
            Request::Ingest { label, main } => {
                // Whatever comes of it, the files are gone afterwards.
                let files = std::mem::take(&mut self.files);
                let _shares = std::mem::take(&mut self.file_shares);
                plain(self.ingest(domain, files, label.as_deref(), main.as_deref())?)
            }
            Request::Attach { model } => {
                let model = store.resolve(&model)?;
                self.attach(domain, model)?
            }
            Request::Open { model, object } => self.open(&model, &object)?,
            Request::List => {
                let list = Listed::all(store)?;
                let json = serde_json::to_vec(&list).map_err(io::Error::from);
                with_bytes(
                    Reply::File,
                    "models",
                    &json.map_err(Error::io("list", store.root()))?,
                )?
            }
            Request::Show { model } => {
                let manifest = store.manifest(&store.resolve(&model)?)?;
                with_bytes(Reply::File, "manifest", &manifest.encode())?
            }
            Request::Stats => plain(Reply::Stats(AgentStats {
                store: store.stats()?,
                yours: domain.owners.used(store, self.peer.user)?,
                quota_per_user: domain.served.quota_per_user,
                clients: self.shared.clients(),
            })),
            Request::Label { label, model } => {
                let model = store.resolve(&model)?;
                let Peer { user, admin, .. } = self.peer;
                domain
                    .owners
                    .set_label(store, &label, &model, user, admin)?;
                plain(Reply::Done)
            }
            Request::Unlabel { label } => {
                let Peer { user, admin, .. } = self.peer;
                if !domain.owners.remove_label(store, &label, user, admin)? {
                    return Err(Refusal::Unknown.because(format!("there is no label `{label}`")));
                }
                plain(Reply::Done)
            }
            Request::View { model, kind, name } => {
                let model = store.resolve(&model)?;
                plain(self.export(domain, &model, kind, &name)?)
            }
            Request::RemoveView { name } => plain(self.remove_view(domain, &name)?),
            Request::Reclaim => {
                if !self.peer.admin {
                    let why = "only root and the agent's own user may sweep; it sweeps by itself";
                    return Err(Refusal::NotAllowed.because(why));
                }
                plain(Reply::Reclaimed(self.shared.sweep(domain)?))
            }
        })
    }

    fn hello(&mut self, name: &str) -> Result<Reply> {
        if self.domain.is_some() {
            return Err(Refusal::Protocol.because("hello was said already"));
        }
        let mut domains = self.shared.domains.iter();
        let domain = domains.find(|domain| domain.served.store.domain.name() == name);
        // Who may not use a domain does not learn whether there is one.
        let domain = domain.filter(|domain| domain.admits(self.peer));
        let domain = domain.ok_or_else(|| {
            Refusal::UnknownDomain.because(format!(
                "there is no domain `{}` for user {}",
                name.chars().take(100).collect::<String>(),
                self.peer.user
            ))
        })?;
        let root = domain.store.root();
        let metadata = fs::metadata(root).map_err(Error::io("look at", root))?;
        self.domain = Some(domain);
        Ok(Reply::Welcome {
            root: root.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    fn take_files(&mut self, names: Vec<String>, files: Vec<OwnedFd>) -> Result<Reply> {
        if names.len() != files.len() || names.len() > MAX_FILES {
            return Err(Refusal::Protocol.because("one name for each file, and at most 128"));
        }
        let limit = self.shared.config.limits.files_per_user;
        let share = self
            .shared
            .take(self.peer.user, Taken::Files, files.len(), limit)?;
        for (name, file) in names.into_iter().zip(files) {
            let file = File::from(file);
            self.check_file(&file, &name)?;
            self.files.push((name, file));
        }
        self.file_shares.push(share);
        Ok(Reply::Done)
    }

    /// Only what can be read without waiting for whoever passed it on.
    fn check_file(&self, file: &File, name: &str) -> Result<()> {
        let path = Path::new(name);
        let metadata = file.metadata().map_err(Error::io("look at", path))?;
        if !metadata.is_file() {
            return Err(Refusal::BadModel.because(format!("`{name}` is not a regular file")));
        }
        let kind = fstatfs(file).map_err(Error::io("look at", path))?;
        if kind.filesystem_type() == FUSE_SUPER_MAGIC && !self.peer.admin {
            return Err(Refusal::NotAllowed.because(format!(
                "`{name}` is on a FUSE file system, which could keep the agent waiting for ever: copy it to another one"
            )));
        }
        Ok(())
    }

    fn ingest(
        &self,
        domain: &Domain,
        files: Vec<(String, File)>,
        label: Option<&str>,
        main: Option<&str>,
    ) -> Result<Reply> {
        let Peer { user, admin, .. } = self.peer;
        let store = &domain.store;
        let limit = self.shared.config.limits.ingests_per_user;
        let _share = self.shared.take(user, Taken::Ingests, 1, limit)?;
        if let Some(label) = label {
            label::check(label)?;
            if !admin {
                domain.owners.check_label(store, label, user)?;
            }
        }
        let source = open_model_of(files, main, Path::new("given files"))?;
        let small = source
            .sidecars()?
            .iter()
            .map(|it| it.bytes.len() as u64)
            .sum();
        let tensors = source
            .tensors()
            .iter()
            .map(|tensor| ByteSize::new(tensor.len));
        let bytes = tensors.sum::<ByteSize>() + ByteSize::new(small);
        let quota = domain.served.quota_per_user.filter(|_| !admin);
        let _coming = domain.owners.expect(store, user, bytes, quota)?;

        let start = Instant::now();
        let last = AtomicU64::new(0);
        let progress = |progress: Progress| {
            let now = start.elapsed().as_millis() as u64;
            let before = last.load(Ordering::Relaxed);
            let due = now >= before + PROGRESS_EVERY.as_millis() as u64;
            // Ordering: it only spaces out messages.
            let ours = due
                && last
                    .compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed)
                    .is_ok();
            if ours {
                let Progress { done, total } = progress;
                // Left out where the client is behind; and if it is gone, the ingest goes on.
                let _ = self
                    .channel
                    .send(&Reply::Progress { done, total }, &[], false);
            }
        };
        let options = IngestOptions {
            progress: Some(&progress),
            ..IngestOptions::default()
        };
        let ingested = store.ingest_with(&*source, &options)?;
        domain.owners.brought(user, &ingested.model)?;
        if let Some(label) = label {
            domain
                .owners
                .set_label(store, label, &ingested.model, user, admin)?;
        }
        Ok(Reply::Ingested(ingested))
    }

    fn attach(&mut self, domain: &Domain, model: ModelId) -> Result<Answer> {
        let limit = self.shared.config.limits.leases_per_user;
        let share = self.shared.take(self.peer.user, Taken::Leases, 1, limit)?;
        let held = match self.leases.entry(model) {
            std::collections::hash_map::Entry::Occupied(held) => held.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(Held {
                model: domain.store.attach(&model)?,
                shares: Vec::new(),
            }),
        };
        held.shares.push(share);
        let manifest = held.model.manifest().encode();
        with_bytes(Reply::Attached { model }, "manifest", &manifest)
    }

    fn open(&self, model: &ModelId, object: &ObjectId) -> Result<Answer> {
        let held = self.leases.get(model).ok_or_else(|| no_lease(model))?;
        if !held
            .model
            .manifest()
            .tensors
            .iter()
            .any(|it| it.object == *object)
        {
            return Err(Refusal::Unknown.because("the model has no such stored file"));
        }
        let file = held.model.open_object(object)?;
        Ok((Reply::File, Some(file.into())))
    }

    fn detach(&mut self, model: &ModelId) {
        let Some(held) = self.leases.get_mut(model) else {
            return;
        };
        held.shares.pop();
        if held.shares.is_empty() {
            self.leases.remove(model);
        }
    }

    fn export(
        &self,
        domain: &Domain,
        model: &ModelId,
        kind: ViewKind,
        name: &str,
    ) -> Result<Reply> {
        let Peer { user, admin, .. } = self.peer;
        label::check(name)?;
        let views = domain.owners.views_of(&domain.store, user);
        let limit = match self.shared.config.limits.views_per_user {
            _ if admin => usize::MAX,
            limit => limit,
        };
        // Taken before it looks: of several at once, each sees the others, made or being made.
        let _share = self.shared.take(user, Taken::Views, 1, limit)?;
        let being_made = self.shared.taken(user, Taken::Views);
        let made = fs::read_dir(&views).map_or(0, Iterator::count);
        if made.saturating_add(being_made) > limit {
            return Err(Refusal::TooMany
                .because(format!("a user may have {limit} views: remove one first")));
        }
        let quota = domain.served.quota_per_user.filter(|_| !admin);
        let store = &domain.store;
        let view = store.export_admitted(model, kind, &views.join(name), |demand| {
            domain.owners.expect_view(store, user, demand, quota)
        })?;
        Ok(Reply::Exported(view))
    }

    fn remove_view(&self, domain: &Domain, name: &str) -> Result<Reply> {
        // A plain name, so that nothing else goes.
        label::check(name)?;
        let path = domain
            .owners
            .views_of(&domain.store, self.peer.user)
            .join(name);
        match fs::remove_dir_all(&path) {
            Ok(()) => Ok(Reply::Done),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Refusal::Unknown.because(format!("you have no view `{name}`")))
            }
            Err(error) => Err(Error::io("remove", path)(error)),
        }
    }
}

fn plain(reply: Reply) -> Answer {
    (reply, None)
}

fn with_bytes(reply: Reply, name: &str, bytes: &[u8]) -> Result<Answer> {
    let file = sealed(name, bytes).map_err(Error::io("make a memfd for", name))?;
    Ok((reply, Some(file.into())))
}

fn no_lease(model: &ModelId) -> Error {
    Refusal::Protocol.because(format!("this connection has no lease on {model:.12}"))
}
