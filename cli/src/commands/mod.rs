//! The commands, one file each.

pub(crate) mod api;
pub(crate) mod files;
pub(crate) mod generate;
pub(crate) mod jobs;
pub(crate) mod keys;
pub(crate) mod migrate;
pub(crate) mod models;
pub(crate) mod projects;
pub(crate) mod sample;
pub(crate) mod sampler;
pub(crate) mod train;
pub(crate) mod up;
pub(crate) mod worker;
