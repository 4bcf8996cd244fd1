//! What the VMMs of each user take of this daemon: one user's must leave room for those of the others.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use memlane_api::units::Size;
use rustix::process::{Resource, getrlimit};

use crate::config::AttachConfig;

/// Connections of one user that may be introducing themselves.
const GREETING: u64 = 16;
/// Those that may do so or wait for that.
const CONNECTIONS: u64 = 1024;

/// What can be taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Connections that have not introduced themselves,
    pub connections: u64,
    /// and those of them whose turn it is.
    pub greeting: u64,
    /// Guests.
    pub guests: u64,
    /// File descriptors.
    pub descriptors: u64,
    /// Bytes of guests' memory that are mapped, whether they hold anything or not.
    pub bytes: u64,
}

/// What each user has taken.
#[derive(Default)]
pub struct Accounts {
    users: RefCell<HashMap<u32, Amount>>,
}

/// What one user has taken at once; given back when this is dropped.
pub struct Share {
    accounts: Rc<Accounts>,
    user: u32,
    amount: Amount,
}

impl Accounts {
    /// Takes so much more for `user`; an error says which bound of `limits` that would exceed.
    pub fn take(self: &Rc<Self>, user: u32, more: Amount, limits: &AttachConfig) -> Result<Share, String> {
        let mut users = self.users.borrow_mut();
        let before = users.get(&user).copied().unwrap_or_default();
        let then = before.plus(more);
        let may = |what: &str, bound: String, key: &str| {
            Err(format!("user {user} may have {bound} {what} here at once; see {key} in the configuration"))
        };
        if then.connections > CONNECTIONS {
            return Err(format!(
                "{CONNECTIONS} connections of user {user} wait to introduce themselves already"
            ));
        }
        if then.greeting > GREETING {
            let what = "connections that have not introduced themselves";
            return Err(format!("user {user} may have {GREETING} {what} here at once"));
        }
        if then.guests > limits.guests_per_user {
            return may("guests", limits.guests_per_user.to_string(), "attach.guests_per_user");
        }
        if then.bytes > limits.memory_per_user.0 {
            let bound = Size(limits.memory_per_user.0);
            return may("of guests' memory", bound.to_string(), "attach.memory_per_user");
        }
        // Whatever is configured, half of what the daemon may have is for the others and for itself.
        let half = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 2;
        let bound = limits.descriptors_per_user.min(half);
        if then.descriptors > bound {
            let key = "attach.descriptors_per_user and LimitNOFILE";
            return may("file descriptors", bound.to_string(), key);
        }
        users.insert(user, then);
        Ok(Share { accounts: self.clone(), user, amount: more })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut users = self.accounts.users.borrow_mut();
        let left = users.get(&self.user).map(|had| had.minus(self.amount)).unwrap_or_default();
        match left == Amount::default() {
            true => users.remove(&self.user),
            false => users.insert(self.user, left),
        };
    }
}

impl Amount {
    fn plus(self, more: Self) -> Self {
        self.with(more, u64::saturating_add)
    }

    fn minus(self, less: Self) -> Self {
        self.with(less, u64::saturating_sub)
    }

    fn with(self, other: Self, change: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            connections: change(self.connections, other.connections),
            greeting: change(self.greeting, other.greeting),
            guests: change(self.guests, other.guests),
            descriptors: change(self.descriptors, other.descriptors),
            bytes: change(self.bytes, other.bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_users_crowd_leaves_room_for_others() {
        let accounts = Rc::<Accounts>::default();
        let memory_per_user = Size(1 << 40);
        let limits = AttachConfig { guests_per_user: 2, descriptors_per_user: 12, memory_per_user };
        let guest = |bytes| Amount { guests: 1, descriptors: 3, bytes, ..Amount::default() };
        let take = |user, amount| accounts.take(user, amount, &limits);
        let refused = |user, amount| take(user, amount).err().unwrap();

        // A sparse giant, and as much in two parts.
        assert!(refused(1, guest(64 << 40)).contains("1TiB of guests' memory"));
        assert!(refused(1, guest(u64::MAX)).contains("attach.memory_per_user"));
        let first = take(1, guest(1 << 39)).unwrap();
        assert!(refused(1, guest((1 << 39) + 4096)).contains("attach.memory_per_user"));
        let second = take(1, guest(1 << 39)).unwrap();
        assert!(refused(1, guest(4096)).contains("may have 2 guests"));
        let fds = |descriptors| Amount { descriptors, ..Amount::default() };
        assert!(refused(1, fds(7)).contains("12 file descriptors"));
        let other = take(2, guest(1 << 40)).unwrap();
        drop(first);
        let third = take(1, guest(4096)).unwrap();
        drop((second, third, other));
        assert!(accounts.users.borrow().is_empty());

        let greeting = Amount { greeting: 1, ..Amount::default() };
        let crowd: Vec<_> = (0..GREETING).map(|_| take(1, greeting).unwrap()).collect();
        assert!(refused(1, greeting).contains("have not introduced themselves"));
        assert!(take(2, greeting).is_ok());
        drop(crowd);
        assert!(take(1, greeting).is_ok());
    }
}
