-- Prelude: `lease_of` returns the lease in a key, or false.
-- requires: typed
local function lease_of(key)
  return is_a('string', key) and redis.call('GET', key)
end
