//! A daemon that moves nothing: what happens to an order is said by the guest's name.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use memlane_api::client::Client;
use memlane_api::types::*;
use memlaned::api::access::Access;
use memlaned::api::{Backend, Caller, server};
use tempfile::TempDir;
use tokio::sync::{Notify, watch};
use tokio::task::LocalSet;
use tokio::time::sleep;

/// A daemon on a socket of its own.
pub(crate) struct Daemon {
    directory: TempDir,
    end_preflight: Arc<Notify>,
    preflight: mpsc::Receiver<()>,
}

struct Fake {
    guests: RefCell<Vec<GuestInfo>>,
    migrations: RefCell<Vec<watch::Sender<Migration>>>,
    end_preflight: Arc<Notify>,
    preflight: mpsc::Sender<()>,
}

impl Daemon {
    /// Starts it on a thread that lives as long as the test's process.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (socket, end_preflight) = (directory.path().join("api.sock"), Arc::new(Notify::new()));
        let (sender, preflight) = mpsc::channel();
        let (bound, is_bound) = mpsc::channel();
        let notify = end_preflight.clone();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, async {
                let mut web0 = Migration::new(format!("{:032x}", 0xaaaa), "web0", "host-b");
                web0.phase = Phase::Copying;
                let migrations = RefCell::new(vec![watch::Sender::new(web0)]);
                let guests = RefCell::new(vec![guest("web1")]);
                let fake = Fake { guests, migrations, end_preflight: notify, preflight: sender };
                let access = Access::of_this_process();
                let listener = server::bind(&socket, access.socket_mode()).unwrap();
                bound.send(()).unwrap();
                server::serve(listener, access, Rc::new(fake)).await;
            });
        });
        is_bound.recv().unwrap();
        Self { directory, end_preflight, preflight }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("api.sock")
    }

    /// Whether the latest migration of a guest has not ended, asked as anyone would.
    pub(crate) fn is_under_way(&self, guest: &str) -> bool {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let migrations = runtime.block_on(Client::new(self.socket()).migrations()).unwrap();
        let latest = migrations.iter().rev().find(|migration| migration.guest == guest).unwrap();
        latest.outcome.is_none()
    }

    /// Waits until the preflight of `slow1` has begun.
    pub(crate) fn wait_for_preflight(&self) {
        self.preflight.recv().unwrap();
    }

    /// Lets it end.
    pub(crate) fn end_preflight(&self) {
        self.end_preflight.notify_one();
    }
}

fn guest(name: &str) -> GuestInfo {
    GuestInfo {
        name: name.to_owned(),
        vmm: "memlane-vmm".to_owned(),
        machine: None,
        vcpus: 2,
        ram_bytes: 1 << 30,
        tracker: "ring".to_owned(),
        standing: Standing::Running,
        nics: Vec::new(),
        pid: Some(4711),
        qmp: None,
    }
}

impl Fake {
    fn take(&self, name: &str, qmp: &str, incoming: bool) -> GuestInfo {
        let guest = GuestInfo {
            vmm: "qemu".to_owned(),
            machine: Some("pc-q35-7.2".to_owned()),
            tracker: "pagemap".to_owned(),
            standing: if incoming { Standing::Incoming } else { Standing::Running },
            qmp: Some(qmp.to_owned()),
            ..guest(name)
        };
        self.guests.borrow_mut().push(guest.clone());
        guest
    }

    fn find(&self, id: &str) -> Result<watch::Sender<Migration>, ApiError> {
        let unknown = || ApiError::new(ErrorCode::UnknownMigration, format!("no migration {id}"));
        let migrations = self.migrations.borrow();
        migrations.iter().find(|migration| migration.borrow().id == id).cloned().ok_or_else(unknown)
    }
}

fn end(sender: &watch::Sender<Migration>, outcome: Outcome, at: &str, reason: Option<&str>) {
    sender.send_modify(|migration| {
        migration.phase = Phase::Ended;
        migration.outcome = Some(outcome);
        migration.guest_runs_at = Some(at.to_owned());
        migration.reason = reason.map(str::to_owned);
    });
}

/// What becomes of an order.
async fn play(guest: String, sender: watch::Sender<Migration>) {
    sleep(Duration::from_millis(150)).await;
    sender.send_modify(|migration| {
        migration.phase = Phase::Copying;
        migration.pages_total = 1000;
        migration.rounds.push(Round { round: 1, pages: 1000, ..Round::default() });
        for port in ["a", "b"] {
            migration.lanes.push(Lane { port: port.to_owned(), bytes: 1 << 20, ..Lane::default() });
        }
        migration.bytes_sent = 2 << 20;
    });
    sleep(Duration::from_millis(150)).await;
    match guest.as_str() {
        "web1" => {
            sender.send_modify(|migration| {
                migration.total_seconds = 0.3;
                migration.downtime_seconds = Some(0.008);
                migration.downtime_predicted_seconds = Some(0.009);
            });
            end(&sender, Outcome::Completed, "host-b", None);
        }
        "fails1" => end(&sender, Outcome::Failed, "host-a", Some("host-b went away")),
        "cancelled1" => end(&sender, Outcome::Cancelled, "host-a", None),
        _ => {}
    }
}

#[async_trait(?Send)]
impl Backend for Fake {
    async fn status(&self) -> Status {
        Status { host: "host-a".to_owned(), insecure: true, migrations: 1, ..Status::default() }
    }
    async fn ports(&self) -> Vec<PortInfo> {
        let (name, address) = ("a".to_owned(), "10.1.0.1".to_owned());
        vec![PortInfo { name, address, speed_bits_per_second: Some(10_000_000_000), ..PortInfo::default() }]
    }
    fn peers(&self) -> Vec<PeerInfo> {
        vec![PeerInfo { name: "host-b".to_owned(), control: "10.0.0.2:7410".to_owned() }]
    }
    fn guests(&self) -> Vec<GuestInfo> {
        self.guests.borrow().clone()
    }
    async fn launch(&self, _: Caller, launch: Launch) -> Result<GuestInfo, ApiError> {
        match launch.definition.as_str() {
            "name = \"web1\"\n" => Err(ApiError::new(ErrorCode::CannotLaunch, "there is a guest web1")),
            "name = \"qemu1\"\n" => {
                Ok(self.take("qemu1", "/run/memlane/guests/qemu1/qmp.sock", launch.incoming))
            }
            _ => Err(ApiError::new(ErrorCode::Invalid, "guest file:1: name is missing")),
        }
    }
    async fn attach(&self, _: Caller, attach: Attach) -> Result<GuestInfo, ApiError> {
        match attach.name.as_str() {
            "web1" => Err(ApiError::new(ErrorCode::CannotAttach, "there is a guest web1")),
            name => Ok(self.take(name, &attach.qmp, attach.incoming)),
        }
    }
    async fn detach(&self, _: Caller, name: &str) -> Result<GuestInfo, ApiError> {
        let mut guests = self.guests.borrow_mut();
        let unknown = || ApiError::new(ErrorCode::UnknownGuest, format!("no guest {name} is attached"));
        let found = guests.iter().position(|guest| guest.name == name).ok_or_else(unknown)?;
        match guests[found].qmp {
            Some(_) => Ok(guests.remove(found)),
            None => Err(ApiError::new(ErrorCode::CannotDetach, format!("{name} attached by itself"))),
        }
    }
    fn migrations(&self) -> Vec<Migration> {
        self.migrations.borrow().iter().map(|migration| migration.borrow().clone()).collect()
    }
    fn migration(&self, id: &str) -> Result<Migration, ApiError> {
        self.find(id).map(|migration| migration.borrow().clone())
    }
    async fn check(&self, order: Order) -> Result<CheckReport, ApiError> {
        let finding = Finding {
            severity: Severity::Refused,
            what: "memory".to_owned(),
            detail: "too little".to_owned(),
            remedy: None,
        };
        let findings = match order.guest.as_str() {
            "nobody" => return Err(ApiError::new(ErrorCode::UnknownGuest, "no guest nobody is attached")),
            "big1" => vec![finding],
            _ => Vec::new(),
        };
        let ok = findings.is_empty();
        Ok(CheckReport { ok, guest: order.guest, host: order.host, findings, ..CheckReport::default() })
    }
    async fn migrate(&self, _: Caller, order: Order) -> Result<Migration, ApiError> {
        match order.guest.as_str() {
            "big1" => return Err(ApiError::new(ErrorCode::Refused, "too little memory at host-b")),
            "not-yours" => {
                return Err(ApiError::new(ErrorCode::Forbidden, "user 1000 may look, but not give orders"));
            }
            "esc1" => {
                return Err(ApiError::new(ErrorCode::Refused, "cpu: \u{1b}[2J\u{9b}m\u{202e}\nmemory: none"));
            }
            "slow1" => {
                self.preflight.send(()).unwrap();
                self.end_preflight.notified().await;
            }
            _ => {}
        }
        let id = format!("{:032x}", (0xbbbb_u128 + self.migrations.borrow().len() as u128) << 96);
        let mut migration = Migration::new(id, &order.guest, order.host);
        migration.downtime_limit_seconds = order.downtime_limit_seconds.unwrap_or(0.3);
        let sender = watch::Sender::new(migration.clone());
        if order.guest != "dies1" {
            self.migrations.borrow_mut().push(sender.clone());
            tokio::task::spawn_local(play(order.guest, sender));
        }
        Ok(migration)
    }
    fn cancel(&self, _: Caller, id: &str) -> Result<Migration, ApiError> {
        let sender = self.find(id)?;
        let guest = sender.borrow().guest.clone();
        if guest == "late1" {
            return Err(ApiError::new(ErrorCode::TooLate, "late1 has switched over"));
        }
        end(&sender, Outcome::Cancelled, "host-a", None);
        self.migration(id)
    }
    fn abandon(&self, _: Caller, id: &str) -> Result<Migration, ApiError> {
        let sender = self.find(id)?;
        if sender.borrow().guest != "late1" {
            return Err(ApiError::new(ErrorCode::TooLate, "nothing of it is missing"));
        }
        end(&sender, Outcome::Lost, "host-b", Some("abandoned by the operator"));
        self.migration(id)
    }
    fn resolve(&self, _: Caller, id: &str, resolve: Resolve) -> Result<Migration, ApiError> {
        let sender = self.find(id)?;
        if sender.borrow().guest != "late1" {
            return Err(ApiError::new(ErrorCode::NotInDoubt, "it is not in doubt"));
        }
        let (outcome, at) = match resolve.action {
            Resolution::RunHere => (Outcome::Completed, "host-b"),
            Resolution::Discard => (Outcome::Failed, "nowhere"),
        };
        end(&sender, outcome, at, Some("the operator said so"));
        self.migration(id)
    }
    fn watch(&self, id: &str) -> Result<watch::Receiver<Migration>, ApiError> {
        match self.find(id) {
            Ok(sender) => Ok(sender.subscribe()),
            // Of dies1: the sender is dropped here.
            Err(_) => Ok(watch::Sender::new(Migration::new(id, "dies1", "host-b")).subscribe()),
        }
    }
    async fn metrics(&self) -> String {
        String::new()
    }
}
