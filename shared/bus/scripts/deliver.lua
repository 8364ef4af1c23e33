-- Prelude: `deliver` appends a message to the stream of a gateway; one that is gone has no stream, and gets nothing.
-- requires: typed
local function deliver(deltas, length, v, m)
  if is_a('stream', deltas) then redis.call('XADD', deltas, 'MAXLEN', '~', length, '*', 'v', v, 'm', m) end
end
