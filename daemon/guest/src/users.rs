//! Each guest that this daemon starts has a user of its own, who is no other guest's at the same time.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use memlane_net::journal::VmmIdentity;
use memlane_net::task;
use memlane_protocol::wire::Label;
use memlane_protocol::wire::starter::GuestUsers;

use crate::process;

/// There is no user for a guest.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The guest file names a user who is not for guests.
    #[error(
        "the guest file says user = {user}, and guests here run as users {range}; name one of those, or change \
         guests.users in the daemon's configuration"
    )]
    Outside {
        /// This is the user.
        user: u32,
        /// These users are for guests.
        range: GuestUsers,
    },
    /// Another guest has the user that the guest file names.
    #[error(
        "user {user}, whom the guest file names, is that of another guest here; each needs a user of its own"
    )]
    Taken {
        /// This is the user.
        user: u32,
    },
    /// All users are taken.
    #[error("all users for guests ({0}) are taken; see guests.users in the daemon's configuration")]
    None(GuestUsers),
}

/// Lists the users that guests have.
pub struct Users {
    range: GuestUsers,
    leases: RefCell<BTreeMap<u32, Leased>>,
}

/// A user that a guest has.
#[derive(Default)]
struct Leased {
    /// This is the guest's QEMU, when it is known.
    process: Option<VmmIdentity>,
    /// There are so many leases: a QEMU that the daemon has let go of may be taken in again.
    leases: usize,
}

/// A guest has this user until this is dropped.
pub(crate) struct Lease {
    users: Rc<Users>,
    user: u32,
}

impl Users {
    /// Gives out the users of this range.
    pub fn new(range: GuestUsers) -> Rc<Self> {
        Rc::new(Self { range, leases: RefCell::default() })
    }

    /// Tells whether the user is one for guests that this daemon starts.
    pub(crate) fn contains(&self, user: u32) -> bool {
        self.range.contains(user)
    }

    /// Tells whether the process is the QEMU of the guest that has this user.
    pub(crate) fn is_guest(&self, user: u32, process: VmmIdentity) -> bool {
        self.leases.borrow().get(&user).is_some_and(|leased| leased.process == Some(process))
    }

    /// Gives a guest the user that its file names, or else a free one: mostly the same one for guests of one name.
    ///
    /// # Errors
    ///
    /// Fails if the user is not for guests, or is another's, or if none is free.
    pub(crate) async fn lease(self: &Rc<Self>, name: &Label, named: Option<u32>) -> Result<Lease, UserError> {
        if let Some(user) = named.filter(|user| !self.contains(*user)) {
            return Err(UserError::Outside { user, range: self.range });
        }
        if let Some(user) = named {
            return self.enter(user, None).ok_or(UserError::Taken { user });
        }
        // A QEMU may run that no record tells of.
        let range = self.range;
        let busy = task::aside(move || process::users(|user| range.contains(user))).await;
        let first = xxhash_rust::xxh3::xxh3_64(name.as_str().as_bytes());
        let mut users = (0..u64::from(range.count())).map(|next| range.nth(first.wrapping_add(next)));
        let free = users.find(|user| !busy.contains(user) && !self.leases.borrow().contains_key(user));
        free.and_then(|user| self.enter(user, None)).ok_or(UserError::None(range))
    }

    /// Takes note of a QEMU that runs as this user already. Returns `None` if another guest has the user.
    pub(crate) fn renew(self: &Rc<Self>, user: u32, process: VmmIdentity) -> Option<Lease> {
        self.enter(user, Some(process))
    }

    fn enter(self: &Rc<Self>, user: u32, process: Option<VmmIdentity>) -> Option<Lease> {
        let mut leases = self.leases.borrow_mut();
        let leased = leases.entry(user).or_default();
        if leased.leases > 0 && (process.is_none() || leased.process != process) {
            return None;
        }
        (leased.process, leased.leases) = (process, leased.leases + 1);
        Some(Lease { users: self.clone(), user })
    }
}

impl Lease {
    /// Returns the user.
    pub(crate) fn user(&self) -> u32 {
        self.user
    }

    /// Notes which process is the guest's QEMU.
    pub(crate) fn note(&self, process: VmmIdentity) {
        if let Some(leased) = self.users.leases.borrow_mut().get_mut(&self.user) {
            leased.process = Some(process);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.users.leases.borrow_mut();
        let Some(leased) = leases.get_mut(&self.user) else { return };
        leased.leases -= 1;
        if leased.leases == 0 {
            leases.remove(&self.user);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROCESS: VmmIdentity = VmmIdentity { pid: 7, started: 70 };

    fn run(test: impl AsyncFnOnce()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    }

    #[test]
    fn no_two_guests_have_one_user() {
        run(async || {
            let users = Users::new("2100000000-2100000002".parse().unwrap());
            let lease = async |name: &str, named| users.lease(&name.parse().unwrap(), named).await;
            let refused = async |name: &str, named| lease(name, named).await.err().unwrap().to_string();

            let pinned = lease("web1", Some(2_100_000_001)).await.unwrap();
            assert!(refused("web2", Some(2_100_000_001)).await.contains("is that of another guest"));
            let told = refused("web2", Some(1000)).await;
            assert!(told.contains("2100000000-2100000002") && told.contains("guests.users"), "{told}");
            let [two, three] = [lease("web2", None).await.unwrap(), lease("web3", None).await.unwrap()];
            let mut all = [pinned.user(), two.user(), three.user()];
            all.sort();
            assert_eq!(all, [2_100_000_000, 2_100_000_001, 2_100_000_002]);
            assert!(refused("web4", None).await.contains("are taken"));

            // The same guest finds its user again.
            let before = two.user();
            drop(two);
            assert_eq!(lease("web2", None).await.unwrap().user(), before);

            assert!(!users.is_guest(pinned.user(), PROCESS));
            pinned.note(PROCESS);
            let other = VmmIdentity { started: 71, ..PROCESS };
            assert!(users.is_guest(pinned.user(), PROCESS) && !users.is_guest(pinned.user(), other));
            assert!(!users.is_guest(three.user(), PROCESS));
            // The daemon lets go of the QEMU, which runs on, and takes it in again.
            let user = pinned.user();
            assert!(users.renew(user, other).is_none() && users.renew(three.user(), PROCESS).is_none());
            let again = users.renew(user, PROCESS).unwrap();
            drop(pinned);
            assert!(users.is_guest(user, PROCESS) && lease("web5", Some(user)).await.is_err());
            drop(again);
            assert!(!users.is_guest(user, PROCESS));
            assert!(users.renew(user, PROCESS).is_some());
        });
    }

    #[test]
    fn a_user_who_runs_something_is_not_free() {
        let test = "a_user_who_runs_something_is_not_free";
        if !rustix::process::geteuid().is_root() {
            return memlane_lab::say_skipped(test, "not root (use sudo)");
        }
        let mut command = std::process::Command::new("sleep");
        std::os::unix::process::CommandExt::uid(&mut command, 2_100_000_000);
        let mut child = command.arg("1000").spawn().unwrap();
        run(async || {
            let users = Users::new("2100000000-2100000001".parse().unwrap());
            let name = "web1".parse().unwrap();
            assert_eq!(users.lease(&name, None).await.unwrap().user(), 2_100_000_001);
        });
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
