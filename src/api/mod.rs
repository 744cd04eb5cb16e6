//! The custom resources, one module per version.

pub mod v1alpha1;
