//! This module counts what the VMMs of each user take of this daemon, and limits it: the VMMs of one user must leave
//! room for those of the others.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use memlane_api::units::Size;
use rustix::process::{Resource, getrlimit};

use crate::config::AttachConfig;

/// This many connections of one user may be introducing themselves at once.
const GREETING: u64 = 16;
/// This many connections of one user may be introducing themselves or waiting for their turn.
const CONNECTIONS: u64 = 1024;

/// An amount of everything that is limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    /// This many connections have not introduced themselves.
    pub connections: u64,
    /// This many of those connections have their turn to do so.
    pub greeting: u64,
    /// This many guests are attached.
    pub guests: u64,
    /// This many file descriptors are open.
    pub descriptors: u64,
    /// This many bytes of guests' memory are mapped, with or without contents.
    pub bytes: u64,
}

/// A user's VMMs would take more than they may.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitError {
    /// Too many connections wait for their turn.
    #[error("{CONNECTIONS} connections of user {user} wait to introduce themselves already")]
    Connections {
        /// This is the user id.
        user: u32,
    },
    /// Too many connections are introducing themselves.
    #[error("user {user} may have {GREETING} connections that have not introduced themselves here at once")]
    Greeting {
        /// This is the user id.
        user: u32,
    },
    /// The user has as many guests as it may.
    #[error(
        "user {user} may have {bound} guests here at once; see attach.guests_per_user in the configuration"
    )]
    Guests {
        /// This is the user id.
        user: u32,
        /// This many guests are allowed.
        bound: u64,
    },
    /// The guests of the user would have more memory than they may.
    #[error(
        "user {user} may have {bound} of guests' memory here at once; see attach.memory_per_user in the \
         configuration"
    )]
    Memory {
        /// This is the user id.
        user: u32,
        /// This much memory is allowed.
        bound: Size,
    },
    /// The connections and guests of the user would need more file descriptors than they may.
    #[error(
        "user {user} may have {bound} file descriptors here at once; see attach.descriptors_per_user and \
         LimitNOFILE in the configuration"
    )]
    Descriptors {
        /// This is the user id.
        user: u32,
        /// This many file descriptors are allowed.
        bound: u64,
    },
}

/// This is what each user has taken.
#[derive(Default)]
pub(crate) struct Accounts {
    users: RefCell<HashMap<u32, Amount>>,
}

/// This is an amount that one user has taken, which is given back when this is dropped.
pub(crate) struct Share {
    accounts: Rc<Accounts>,
    user: u32,
    amount: Amount,
}

impl Accounts {
    /// Takes the amount `more` for `user`, in addition to what that user has already.
    ///
    /// # Errors
    ///
    /// Fails, and takes nothing, if that would exceed one of the `limits`.
    pub(crate) fn take(
        self: &Rc<Self>,
        user: u32,
        more: Amount,
        limits: &AttachConfig,
    ) -> Result<Share, LimitError> {
        let mut users = self.users.borrow_mut();
        let before = users.get(&user).copied().unwrap_or_default();
        let then = before.plus(more);
        if then.connections > CONNECTIONS {
            return Err(LimitError::Connections { user });
        }
        if then.greeting > GREETING {
            return Err(LimitError::Greeting { user });
        }
        if then.guests > limits.guests_per_user {
            return Err(LimitError::Guests { user, bound: limits.guests_per_user });
        }
        if then.bytes > limits.memory_per_user.0 {
            return Err(LimitError::Memory { user, bound: limits.memory_per_user });
        }
        // In any configuration, half of what the daemon may have is left for other users and for itself.
        let half = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 2;
        let bound = limits.descriptors_per_user.min(half);
        if then.descriptors > bound {
            return Err(LimitError::Descriptors { user, bound });
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
        let refused = |user, amount| take(user, amount).err().unwrap().to_string();

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
