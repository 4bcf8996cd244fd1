//! Pictures: SVG drawn by hand, for a page or for itself.
//!
//! A [`Panel`] joins two [`Scale`]s and draws axes and marks into an [`Svg`]. Colours and type are classes of the style
//! sheet [`style::PICTURE`], for light and dark surroundings.

mod panel;
mod scale;
pub(crate) mod style;
mod svg;
mod unit;

pub(crate) use panel::{GUTTER, LINE, Panel, spread, width_of};
pub(crate) use scale::Scale;
pub(crate) use svg::{Anchor, Escaped, Svg};
pub(crate) use unit::{Unit, digits};

/// How wide pictures are.
pub(crate) const WIDTH: f64 = 960.0;

/// A picture that is done.
#[derive(Debug, Clone)]
pub struct Picture {
    svg: Svg,
    height: f64,
    tells: String,
}

impl Picture {
    /// A picture of this height. What it tells is said in words, for those who cannot see it.
    pub(crate) fn new(svg: Svg, height: f64, tells: impl Into<String>) -> Self {
        Self { svg, height, tells: tells.into() }
    }

    /// As a part of a page with the style sheet.
    pub(crate) fn inline(&self) -> String {
        self.svg.picture((WIDTH, self.height), &self.tells, "")
    }

    /// As a file.
    pub fn file(&self) -> String {
        self.svg.picture((WIDTH, self.height), &self.tells, style::PICTURE)
    }
}
