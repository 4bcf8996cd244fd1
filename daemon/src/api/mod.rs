//! The daemon's API: HTTP/1.1 and JSON on a Unix socket, described by `openapi.json`.
//!
//! [`types`](memlane_api::types) is what it says, [`routes`] where, [`Backend`] who answers, [`server`] how the
//! answers reach a socket.

mod body;
mod caller;
mod line;
pub mod openapi;
pub mod routes;
pub mod server;
mod streams;

#[cfg(test)]
mod tests;

use async_trait::async_trait;
use memlane_api::types::{
    ApiError, Attach, CheckReport, GuestInfo, Launch, Migration, Order, PeerInfo, PortInfo, Resolve, Status,
};
use tokio::sync::watch;

pub use caller::Caller;

/// Who answers: the host.
///
/// The methods that are not `async` answer at once. The others bound their own time; they are
/// run to their end even if whoever asked goes away. Those that change something are told who asked.
#[async_trait(?Send)]
pub trait Backend {
    /// The daemon and its host.
    async fn status(&self) -> Status;
    /// Ports lent to migrations.
    async fn ports(&self) -> Vec<PortInfo>;
    /// Hosts that guests may move to and come from.
    fn peers(&self) -> Vec<PeerInfo>;
    /// Attached guests.
    fn guests(&self) -> Vec<GuestInfo>;
    /// Starts a QEMU guest.
    async fn launch(&self, caller: Caller, launch: Launch) -> Result<GuestInfo, ApiError>;
    /// Takes a QEMU guest that others started.
    async fn attach(&self, caller: Caller, attach: Attach) -> Result<GuestInfo, ApiError>;
    /// Lets go of a QEMU guest, which goes on without the daemon; tells what it was.
    async fn detach(&self, caller: Caller, name: &str) -> Result<GuestInfo, ApiError>;
    /// Migrations under way and those that ended lately, the oldest first.
    fn migrations(&self) -> Vec<Migration>;
    /// One of them.
    fn migration(&self, id: &str) -> Result<Migration, ApiError>;
    /// Does the preflight of an order, and nothing else.
    async fn check(&self, order: Order) -> Result<CheckReport, ApiError>;
    /// Does the preflight of an order and begins it; it then runs on its own.
    async fn migrate(&self, caller: Caller, order: Order) -> Result<Migration, ApiError>;
    /// Asks a migration to end with the guest at the source. It has ended when its outcome says so.
    fn cancel(&self, caller: Caller, id: &str) -> Result<Migration, ApiError>;
    /// Gives up what is missing of a guest that runs at its destination without all of its memory.
    fn abandon(&self, caller: Caller, id: &str) -> Result<Migration, ApiError>;
    /// Decides about a guest in doubt, as its operator has said.
    fn resolve(&self, caller: Caller, id: &str, resolve: Resolve) -> Result<Migration, ApiError>;
    /// Follows a migration. The sender sets the outcome last and may then be dropped.
    fn watch(&self, id: &str) -> Result<watch::Receiver<Migration>, ApiError>;
    /// All metrics, as Prometheus reads them.
    async fn metrics(&self) -> String;
}
