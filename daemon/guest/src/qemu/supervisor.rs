//! This module keeps the connections to the QEMUs of this host. A linked VMM connects again by itself, but to a QEMU
//! the daemon has to connect.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::rc::Rc;
use std::time::{Duration, Instant};

use memlane_net::journal::VmmIdentity;
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::attach::RunState;
use serde_json::json;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::child::collect;
use super::definition::Definition;
use super::driver::Qemu;
use super::inspect::inspect;
use super::launch::{self, Started};
use super::machine::Parts;
use super::qmp::{Qmp, is_migrating};
use super::ram;
use super::settings::Settings;
use super::state_directory::{Paths, Record, StateDirectory, paths};
use super::{QemuError, RunStateError};
use crate::config::{GuestsConfig, QemuSettings};
use crate::driver::DriverError;
use crate::guest::Guest;
use crate::memory::VmmMemory;
use crate::process::Process;
use crate::registry::Guests;
use crate::shim::Shims;
use crate::users::{Lease, UserError, Users};

/// If a QEMU's monitor does not answer, it is tried again after this time.
const AGAIN: Duration = Duration::from_millis(500);
/// The QEMU of a guest that has just left may take this long to end.
const LEAVING: Duration = Duration::from_secs(5);

/// Starts the QEMUs of this host, takes them in, and keeps the connections to them.
pub struct Supervisor {
    settings: QemuSettings,
    guests: Rc<Guests>,
    shims: Rc<Shims>,
    states: Rc<StateDirectory>,
    /// These QEMUs are kept, by the names of their guests. A sent true ends the keeping of one.
    kept: RefCell<BTreeMap<Label, watch::Sender<bool>>>,
    users: Rc<Users>,
    /// These guests have users of their own.
    leases: RefCell<BTreeMap<Label, Lease>>,
}

/// Reserves the name of one QEMU's guest, which no other guest can take meanwhile.
struct NameReservation {
    supervisor: Rc<Supervisor>,
    name: Label,
    /// This becomes true when the QEMU is to be let go of.
    let_go: watch::Receiver<bool>,
}

impl Supervisor {
    /// Makes a supervisor whose state lies in `directory`. It keeps no QEMU before [`Supervisor::resume`].
    pub fn new(
        settings: QemuSettings,
        directory: &Path,
        (guests, shims, users): (Rc<Guests>, Rc<Shims>, Rc<Users>),
    ) -> Rc<Self> {
        let states = Rc::new(StateDirectory::beside(directory));
        let (kept, leases) = Default::default();
        Rc::new(Self { settings, guests, shims, states, kept, users, leases })
    }

    /// Reads which QEMUs were kept before the daemon ended.
    pub async fn load(&self) {
        self.states.load().await;
        // Before anybody can connect to the attach socket: their shims do.
        for record in self.states.all() {
            let (Some(user), Ok(name)) = (record.user, record.name.parse()) else { continue };
            match self.users.renew(user, record.identity()) {
                Some(lease) => drop(self.leases.borrow_mut().insert(name, lease)),
                None => warn!(guest = %name, user, "two guests are said to have one user"),
            }
        }
    }

    /// Keeps the QEMUs again that were kept before the daemon ended.
    pub fn resume(self: &Rc<Self>) {
        for record in self.states.all() {
            let Ok(name) = record.name.parse::<Label>() else { continue };
            task::spawn("watch of a QEMU", NameReservation::new(self, name).stay(record, None, None));
        }
    }

    /// Returns what the configuration says of the guests that this daemon starts.
    pub fn guests_config(&self) -> &GuestsConfig {
        &self.settings.guests
    }

    /// Starts a guest from its file. With `incoming` it starts a QEMU that waits for a guest to arrive.
    ///
    /// # Errors
    ///
    /// Fails if the file is not permitted here, the name is taken, or QEMU does not start.
    pub async fn launch(
        self: &Rc<Self>,
        definition: Definition,
        incoming: bool,
    ) -> Result<Rc<Guest>, QemuError> {
        let record = Record::launched(&definition, incoming, &self.settings.guests);
        self.start(definition, record).await
    }

    /// Starts the QEMU that a guest which has been offered is to arrive in. It ends if the guest does not arrive.
    ///
    /// # Errors
    ///
    /// Fails as [`Supervisor::launch`] does.
    pub async fn launch_incoming(self: &Rc<Self>, definition: Definition) -> Result<Rc<Guest>, QemuError> {
        let record = Record::launched(&definition, true, &self.settings.guests);
        self.start(definition, Record { launched_for_migration: true, ..record }).await
    }

    /// Takes in the guest of a QEMU that others started, with its monitor at `qmp`.
    ///
    /// # Errors
    ///
    /// Fails if the monitor does not answer, or its guest cannot be moved by this daemon.
    pub async fn attach(
        self: &Rc<Self>,
        name: Label,
        qmp: PathBuf,
        incoming: bool,
    ) -> Result<Rc<Guest>, QemuError> {
        let reserved = NameReservation::take(self, &name).await?;
        let Paths { memory, qmp: own } = paths(&self.settings.guests, &name);
        // One that this daemon has started, and let go of.
        let files = if own == qmp { vec![memory, own] } else { Vec::new() };
        reserved.keep(Record { files, ..Record::attached(name, qmp, incoming) }).await
    }

    /// Lets go of a QEMU, whose guest runs on.
    ///
    /// # Errors
    ///
    /// Fails if there is none of this name, or its guest is being moved.
    pub fn detach(&self, name: &Label) -> Result<Rc<Guest>, QemuError> {
        let guest = self.guests.get(name).filter(|guest| guest.driver.qemu().is_some());
        if guest.as_ref().is_some_and(|guest| guest.is_moving()) {
            return Err(QemuError::Moving(name.clone()));
        }
        // One that cannot be reached is not kept to any more either.
        if let Some(kept) = self.kept.borrow().get(name) {
            kept.send_replace(true);
        }
        guest.ok_or_else(|| QemuError::Unknown(name.clone()))
    }

    /// Returns the path of the monitor of a guest's QEMU, if it is kept.
    pub fn monitor(&self, name: &Label) -> Option<PathBuf> {
        self.states.read(name.as_str()).map(|record| record.qmp)
    }

    /// Finds the memory of a guest through the userfaultfd that its QEMU has kept, without asking QEMU: it may not answer
    /// before pages have come. Returns `None` if this daemon does not keep that process, or if its shim is not there.
    pub async fn kept_memory(&self, name: &Label, process: VmmIdentity) -> Option<VmmMemory> {
        let record = self.states.read(name.as_str()).filter(|record| record.identity() == process)?;
        let handles = self.shims.kept_userfault(process.pid).await;
        let handles =
            handles.inspect_err(|error| debug!(guest = %name, %error, "no memory of a QEMU yet")).ok()?;
        let mapped = ram::map(&record.parts, process.pid, &self.shims).await;
        let found = match mapped {
            Ok((_, ram)) => {
                task::aside(move || handles.find(&ram, true).map_err(|error| error.to_string())).await
            }
            Err(error) => Err(error.to_string()),
        };
        found.inspect_err(|error| warn!(guest = %name, error, "cannot find the memory of a QEMU")).ok()
    }

    /// Remembers that a guest which has arrived runs here now. Does nothing for a guest that is in no QEMU.
    pub fn note_arrival(&self, name: &Label) {
        self.states.note_arrival(name.as_str());
    }

    async fn start(self: &Rc<Self>, definition: Definition, record: Record) -> Result<Rc<Guest>, QemuError> {
        definition.permitted_by(&self.settings.guests)?;
        let reserved = NameReservation::take(self, &definition.name).await?;
        let lease = self.users.lease(&definition.name, definition.user).await?;
        let record = Record { user: Some(lease.user()), ..record };
        let started = launch::start(&self.settings, &definition, &record, &lease).await?;
        self.leases.borrow_mut().insert(definition.name, lease);
        let VmmIdentity { pid, started: since } = started.process.identity();
        reserved.keep_started(started, Record { pid, started: since, ..record }).await
    }

    /// Returns the name of the guest in the QEMU that is this process, if it is kept.
    fn kept_as(&self, process: VmmIdentity) -> Option<String> {
        self.states.all().into_iter().find(|record| record.identity() == process).map(|record| record.name)
    }

    /// Tells whether a guest of this name is about to leave this host.
    async fn is_leaving(&self, name: &Label) -> bool {
        let Some(guest) = self.guests.get(name) else { return true };
        guest.is_moving() || tokio::time::timeout(Duration::ZERO, guest.process.ended()).await.is_ok()
    }
}

impl NameReservation {
    /// Reserves the name of a guest, unless there is one of that name. A guest that is just leaving is waited for.
    async fn take(supervisor: &Rc<Supervisor>, name: &Label) -> Result<Self, QemuError> {
        let until = tokio::time::Instant::now() + LEAVING;
        while supervisor.kept.borrow().contains_key(name) || supervisor.guests.get(name).is_some() {
            if !supervisor.is_leaving(name).await || tokio::time::Instant::now() > until {
                return Err(QemuError::NameTaken(name.clone()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(Self::new(supervisor, name.clone()))
    }

    fn new(supervisor: &Rc<Supervisor>, name: Label) -> Self {
        let sender = watch::Sender::new(false);
        let let_go = sender.subscribe();
        supervisor.kept.borrow_mut().insert(name.clone(), sender);
        Self { supervisor: supervisor.clone(), name, let_go }
    }

    /// Takes in the guest of a QEMU that this daemon has started, and keeps its connection.
    async fn keep_started(self, started: Started, record: Record) -> Result<Rc<Guest>, QemuError> {
        match self.take_in(&record, true).await {
            Ok((guest, record)) => {
                let (pid, user) = (record.pid, record.user);
                info!(guest = %self.name, pid, user, qmp = %record.qmp.display(), "QEMU was started");
                if let Err(error) = self.supervisor.guests.attach(guest.clone()) {
                    started.end(record).await;
                    return Err(error.into());
                }
                task::spawn("watch of a QEMU", self.stay(record, Some(guest.clone()), started.child));
                Ok(guest)
            }
            Err(error) => {
                started.end(record).await;
                Err(error)
            }
        }
    }

    /// Takes in the guest of a QEMU that others started, and keeps its connection.
    async fn keep(self, record: Record) -> Result<Rc<Guest>, QemuError> {
        let (guest, record) = self.take_in(&record, true).await?;
        self.supervisor.guests.attach(guest.clone())?;
        task::spawn("watch of a QEMU", self.stay(record, Some(guest.clone()), None));
        Ok(guest)
    }

    /// Connects to the QEMU, looks at its guest, and writes down what must be remembered. `fresh` says that the daemon
    /// has not had it before.
    async fn take_in(&self, record: &Record, fresh: bool) -> Result<(Rc<Guest>, Record), QemuError> {
        let supervisor = &self.supervisor;
        let qmp = Qmp::connect(&record.qmp).await?;
        let process = Rc::new(Process::running(qmp.pid())?);
        let mut record = record.clone();
        self.check_user(&mut record, qmp.user(), process.identity())?;
        let (status, migration) = (qmp.status().await?, qmp.migration().await?);
        if status == "running" {
            record.stays = None;
        }
        // One that stood still before is left so by a migration that came to nothing.
        let stays_here = record.stays.is_some() && !record.incoming && !record.migrating;
        let loaded = record.incoming && !matches!(status.as_str(), "inmigrate" | "running");
        let by_itself = status == "postmigrate" && !stays_here || is_migrating(&migration) || loaded;
        if !fresh && !record.migrating && by_itself {
            return Err(RunStateError::MigratedByOthers.into());
        }
        // A guest was about to come or to leave, and no more came of it. One that is about to leave may stand still.
        let gave_up = matches!(status.as_str(), "postmigrate" | "finish-migrate");
        let stayed = record.migrating
            && !is_migrating(&migration)
            && (status == "running" || !record.incoming && !gave_up);
        if !fresh && (stayed || status == "inmigrate" && !is_migrating(&migration)) {
            Settings::restore_lost(&qmp).await?;
        }
        if fresh {
            check_state(record.incoming, &status, &migration, listens(&qmp).await?)?;
        }
        let definition =
            record.definition.as_ref().map(|text| Definition::parse(Path::new("the guest file"), text));
        let definition = definition.transpose()?;
        let networks = &supervisor.settings.networks;
        let (memory, shims) = (record.memory(), &supervisor.shims);
        let facts = inspect(&qmp, &self.name, definition.as_ref(), memory, networks, shims).await?;
        if fresh && definition.is_some() {
            record.machine = Some(Parts::look(&qmp).await?);
        }
        // A guest that came, ran, and was stopped later by its operator is promised to no host any more.
        record.incoming &= status != "running";
        record.migrating &= !stayed;
        record.parts = facts.parts.clone();
        (record.pid, record.started) = (process.identity().pid, process.identity().started);
        let run_state = match (status.as_str(), record.incoming) {
            ("inmigrate", _) => RunState::Incoming,
            _ if loaded => RunState::Loaded,
            // A daemon before this one was about to move it.
            ("postmigrate" | "finish-migrate", _) if !stays_here => RunState::Relinquished,
            (_, false) if is_migrating(&migration) => RunState::Relinquished,
            _ => RunState::Running,
        };
        if let Some(name) = supervisor.kept_as(process.identity()).filter(|name| *name != record.name) {
            return Err(QemuError::Twice { pid: record.pid, name });
        }
        record.bond = record.bond.filter(|_| matches!(run_state, RunState::Loaded | RunState::Relinquished));
        supervisor.states.write(&record).await?;
        let (shape, ram) = (facts.shape.clone(), facts.ram.clone());
        let driver = Qemu::new(qmp, facts, process.clone(), (&supervisor.shims, &supervisor.states), &record);
        let guest = Guest::new(shape, ram, Rc::new(driver), process, run_state);
        guest.launched_for_migration.set(record.launched_for_migration);
        guest.bond.replace(record.bond.as_ref().and_then(|bound| bound.bond()));
        Ok((Rc::new(guest), record))
    }

    /// Checks that the process at the other end of the monitor may have a guest here.
    fn check_user(&self, record: &mut Record, user: u32, process: VmmIdentity) -> Result<(), QemuError> {
        let supervisor = &self.supervisor;
        if let Some(expected) = record.user {
            // Nobody else was handed the socket, unless QEMU was taken over.
            return match (user, process) == (expected, record.identity()) {
                true => Ok(()),
                false => Err(QemuError::Impostor {
                    guest: self.name.clone(),
                    found: process.pid,
                    user,
                    expected: record.pid,
                }),
            };
        }
        if supervisor.users.contains(user) && !record.files.is_empty() {
            let lease = supervisor.users.renew(user, process).ok_or(UserError::Taken { user })?;
            supervisor.leases.borrow_mut().insert(self.name.clone(), lease);
            record.user = Some(user);
            return Ok(());
        }
        match supervisor.settings.attach_users.contains(&user) {
            true => Ok(()),
            false => Err(QemuError::User { user }),
        }
    }

    /// Keeps the connection to a QEMU, whose guest is attached if it is given, until QEMU ends or is let go of.
    async fn stay(mut self, mut record: Record, mut guest: Option<Rc<Guest>>, child: Option<Child>) {
        let (mut told, mut lost_since) = (false, None);
        // A guest that was paused when the daemon ended has waited long enough.
        let mut patience = Duration::ZERO;
        loop {
            let process = Process::remembered(record.identity());
            let gone = async {
                if let Some(guest) = guest.take() {
                    (told, lost_since) = (false, None);
                    guest.driver.gone().await;
                }
                // A QEMU that has not been seen since the daemon started may be none any more.
                tokio::time::timeout(std::mem::replace(&mut patience, AGAIN), process.ended()).await.is_ok()
            };
            let ended = tokio::select! {
                ended = gone => Some(ended),
                _ = self.let_go.wait_for(|let_go| *let_go) => None,
            };
            let Some(ended) = ended else {
                self.supervisor.states.remove(&record.name).await;
                info!(guest = %self.name, "let go of a QEMU");
                if let Some(guest) = self.supervisor.guests.get(&self.name) {
                    guest.driver.hang_up();
                }
                // Its user is not free before it has ended.
                let _lease = self.supervisor.leases.borrow_mut().remove(&self.name);
                drop(self);
                process.ended().await;
                return tidy_up(child, record).await;
            };
            if ended {
                info!(guest = %self.name, pid = record.pid, "QEMU has ended");
                tidy_up(child, record.clone()).await;
                self.supervisor.states.remove(&record.name).await;
                return;
            }
            // It may have been changed: a guest has arrived.
            record = self.supervisor.states.read(&record.name).unwrap_or(record);
            match self.take_in(&record, false).await {
                Ok((again, _)) if self.is_useless(&again) => {
                    info!(guest = %self.name, "ending a QEMU whose guest does not come any more");
                    if let Err(error) = again.driver.discard().await {
                        warn!(guest = %self.name, %error, "cannot end a QEMU; trying on");
                    }
                }
                Ok((again, new)) => {
                    // That it was sent away was said; it is tried again.
                    let _ = self.supervisor.guests.attach(again.clone());
                    (guest, record) = (Some(again), new);
                }
                // One that ends has closed its monitor before.
                Err(error) if !told && lost_since.get_or_insert_with(Instant::now).elapsed() > LEAVING => {
                    told = true;
                    warn!(guest = %self.name, %error, "cannot take up a QEMU again; trying on");
                }
                Err(_) => {}
            }
        }
    }

    /// Tells whether QEMU was started for a migration that no task works on any more.
    fn is_useless(&self, guest: &Guest) -> bool {
        let awaited = self.supervisor.guests.work_with(guest.process.identity());
        guest.launched_for_migration.get() && guest.run_state.get() == RunState::Incoming && !awaited
    }
}

impl Drop for NameReservation {
    fn drop(&mut self) {
        self.supervisor.kept.borrow_mut().remove(&self.name);
        self.supervisor.leases.borrow_mut().remove(&self.name);
    }
}

/// Collects a QEMU that has ended, and gives back its memory, which may take the kernel long.
async fn tidy_up(child: Option<Child>, record: Record) {
    let tidy = move || {
        if let Some(mut child) = child {
            collect(&mut child);
        }
        record.remove_files();
    };
    task::aside(tidy).await;
}

/// Tells whether QEMU awaits a migration at an address of its own, and so none that it would be told of.
async fn listens(qmp: &Qmp) -> Result<bool, DriverError> {
    let migration = qmp.execute("query-migrate", json!({})).await?;
    Ok(migration["socket-address"].is_array())
}

/// Checks that the QEMU is in the state that the operator says.
fn check_state(incoming: bool, status: &str, migration: &str, listens: bool) -> Result<(), RunStateError> {
    Err(match (incoming, status) {
        (true, "inmigrate") if !listens && !is_migrating(migration) => return Ok(()),
        (true, "inmigrate") => RunStateError::Listens,
        (true, _) => RunStateError::NotIncoming,
        (false, "inmigrate") => RunStateError::Incoming,
        (false, _) if is_migrating(migration) => RunStateError::Migrating,
        (false, "postmigrate") => RunStateError::Migrated,
        (false, _) => return Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_operator_says_is_compared_with_what_qemu_says() {
        for (incoming, status, migration) in
            [(true, "inmigrate", ""), (false, "running", ""), (false, "paused", "completed")]
        {
            assert!(check_state(incoming, status, migration, false).is_ok());
        }
        for (incoming, status, migration, listens, text) in [
            (true, "inmigrate", "setup", false, "-incoming defer"),
            (true, "inmigrate", "", true, "-incoming defer"),
            (true, "running", "", false, "-incoming defer"),
            (false, "inmigrate", "", false, "--incoming"),
            (false, "running", "active", false, "by itself"),
            (false, "postmigrate", "completed", false, "elsewhere"),
        ] {
            let told = check_state(incoming, status, migration, listens).unwrap_err().to_string();
            assert!(told.contains(text), "{told}");
        }
    }
}
