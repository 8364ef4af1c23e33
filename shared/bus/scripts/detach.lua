-- Remove a gateway from the readers of answers. A gateway is there as long as its stream is.
-- KEYS: record...
-- ARGV: gateway, prefix of deltas
-- Returns the places, from 1, of the requests that have no reader now.
-- requires: other_gateways
-- requires: typed
local alone = {}
for i, record in ipairs(KEYS) do
  if is_a('hash', record) then
    local names, read = other_gateways(record, ARGV[1]), false
    for _, name in ipairs(names) do read = read or redis.call('EXISTS', ARGV[2] .. name) == 1 end
    redis.call('HSET', record, 'gateways', table.concat(names, ' '))
    if not read then alone[#alone + 1] = i end
  end
end
return alone
