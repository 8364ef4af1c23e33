-- Prelude: `newest_reader` returns the newest version of messages that a living replica of a service reads.
-- requires: lease_of
local function newest_reader(index, prefix)
  local newest = 1
  for _, name in ipairs(redis.call('SMEMBERS', index)) do
    local readable, status = pcall(cjson.decode, lease_of(prefix .. name) or '')
    if readable and type(status) == 'table' then newest = math.max(newest, tonumber(status.newest) or 1) end
  end
  return newest
end
