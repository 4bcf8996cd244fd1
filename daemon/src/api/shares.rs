//! Divides what there is a limited number of, so that a crowd of one user, or of viewers, leaves room for others.

use super::Role;

/// The one for whom something is held: a user in a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Holder {
    pub role: Role,
    /// The user; `None` if the kernel does not say.
    pub user: Option<u32>,
}

/// A part of the whole that some holders may have together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Share {
    /// What one user may have in one role: half of all as an operator, a quarter as a viewer.
    OfUser(Holder),
    /// What all viewers may have together: half of all, so that operators find room whatever viewers do.
    OfViewers,
}

impl Share {
    /// Returns the shares that count for a holder.
    pub(super) fn of(holder: Holder) -> Vec<Self> {
        match holder.role {
            Role::Operator => vec![Self::OfUser(holder)],
            Role::Viewer => vec![Self::OfUser(holder), Self::OfViewers],
        }
    }

    /// Returns how many of `all` the share is.
    pub(super) fn most(self, all: usize) -> usize {
        match self {
            Self::OfUser(Holder { role: Role::Viewer, .. }) => all / 4,
            Self::OfUser(_) | Self::OfViewers => all / 2,
        }
    }

    /// Returns whether what this holder has counts towards the share.
    pub(super) fn counts(self, holder: Holder) -> bool {
        match self {
            Self::OfUser(of) => of == holder,
            Self::OfViewers => holder.role == Role::Viewer,
        }
    }

    /// Names the holders of the share.
    pub(super) fn holders(self) -> &'static str {
        match self {
            Self::OfUser(_) => "this user",
            Self::OfViewers => "viewers",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes as many of `all` as the shares allow.
    fn take(held: &mut Vec<Holder>, all: usize, holder: Holder) -> usize {
        let before = held.len();
        while held.len() < all
            && Share::of(holder)
                .iter()
                .all(|share| held.iter().filter(|other| share.counts(**other)).count() < share.most(all))
        {
            held.push(holder);
        }
        held.len() - before
    }

    #[test]
    fn a_crowd_leaves_room_for_others() {
        let holder = |role, user| Holder { role, user: Some(user) };
        let mut held = Vec::new();
        let viewers: Vec<_> = (1..5).map(|user| take(&mut held, 128, holder(Role::Viewer, user))).collect();
        assert_eq!(viewers, [32, 32, 0, 0]);
        // The same user in another role, and another one.
        assert_eq!(take(&mut held, 128, holder(Role::Operator, 1)), 64);
        held.clear();
        assert_eq!(take(&mut held, 128, holder(Role::Operator, 1)), 64);
        assert_eq!(take(&mut held, 128, holder(Role::Operator, 2)), 64);
    }
}
