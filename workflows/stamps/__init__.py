"""The second evidence base: scenes of drawn things on photographs."""
