-- List the leases of a service, and remove names without a lease from the index. Both in one script: a replica that
-- renewed in between would be alive and missing from the index.
-- KEYS: index of the service's replicas
-- ARGV: prefix of lease keys
-- Returns {name, status, ...}.
-- requires: lease_of
local leases = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local lease = lease_of(ARGV[1] .. name)
  if lease then
    leases[#leases + 1], leases[#leases + 2] = name, lease
  else
    redis.call('SREM', KEYS[1], name)
  end
end
return leases
